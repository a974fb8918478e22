"""`make gpu`: the commands that it runs, and its report; the Tritons of `make gpu-proofs`."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import command
from benchmarks.training import train_report
from benchmarks.training.runs import NATIVE, Measured
from benchmarks.training.train_report import Row
from benchmarks.training.works import WORKS
from tests.benchmarks.kit import MACHINE, made, results, row
from tests.gpu import ROOT, main
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda

JUNIT = '<testsuites><testsuite tests="12" failures="1" errors="1" skipped="2"></testsuite></testsuites>'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(command: Sequence[str]) -> int:
        raise AssertionError(command)

    assert main([f"--out={tmp_path}"], run) == 1
    assert capsys.readouterr().err.startswith("make gpu: SMOLORA_DEVICE=cuda: torch ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codes", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_the_report_names_the_card(
    codes: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[Sequence[str]] = []

    def run(words: Sequence[str]) -> int:
        commands.append(words)
        if "pytest" in words:
            (tmp_path / "tests.xml").write_text(JUNIT)
            return codes[0]
        if "benchmarks.serve" in words:
            if not codes[1]:
                command.write(tmp_path, "serve", results([row(1, "base", ours=[123.4] * 3)]))
            return codes[1]
        if not codes[2]:
            rows = [Row(WORKS[0], {NATIVE: (Measured(4567.0, 1, 3.0, 1.0),)})]
            command.write(tmp_path, "train", train_report.Results(made(quick=True), MACHINE, "tiny", 1, rows))
        return codes[2]

    with fake_cuda(Card(name="NVIDIA L4", capabilities=((8, 9),))):
        assert main([f"--out={tmp_path}", "--quick"], run) == max(codes)
    tests, serving, training = commands
    assert tests[1:5] == ["-m", "pytest", "-m", "cuda"]
    flags = ["--device=cuda", f"--out={tmp_path}", "--quick"]
    assert serving[1:] == ["-m", "benchmarks.serve", "--dtype=bf16", *flags]
    assert training[1:] == ["-m", "benchmarks.train", "--torch-dtype=bf16", *flags]
    report = (tmp_path / "gpu.md").read_text()
    assert report.startswith("# NVIDIA L4, compute capability 8.9, 24 GiB; driver ")
    assert f"torch {torch.__version__}" in report.splitlines()[0]
    assert "8 tests passed, 2 failed, 2 were skipped." in report
    assert ("|123" in report) is (not codes[1])
    assert ("The serving benchmark didn't end." in report) is bool(codes[1])
    assert ("4,567" in report) is (not codes[2])
    assert ("The training benchmark didn't end." in report) is bool(codes[2])
    assert "NVIDIA L4" in capsys.readouterr().out


def test_gpu_proofs_compile_with_a_lower_and_a_higher_triton_than_other_tests() -> None:
    versions = {}
    for path in sorted(ROOT.glob("requirements-*.lock")):
        for version in re.findall(r"^triton==([\d.]+); sys_platform", path.read_text(), re.MULTILINE):
            versions[path.stem] = tuple(map(int, version.split(".")))
    lowest, highest = (versions.pop(f"requirements-triton-{name}") for name in ("lowest", "highest"))
    assert versions.keys() == {"requirements-dev"}
    assert (3, 5) <= lowest < versions["requirements-dev"] < highest
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^TRITONS := ([^#\n]*)", makefile, re.MULTILINE) == ["lowest highest"]
