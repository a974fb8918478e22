"""The benchmark of restricted instruction sets: report, targets, and a reduced run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.instruction_sets.__main__ import main
from benchmarks.instruction_sets.report import TITLES, Results, evaluate, markdown
from benchmarks.peers.venvs import INSTRUCTION_FLAGS, MAKERS, restricted
from benchmarks.serving.systems.server_process import ServerConfig
from server.model.native.build import INSTRUCTIONS
from tests.benchmarks.kit import instruction_sets as results
from tests.kits.native import native_library

FOUND, QUICK = results().sets["avx2"], results(quick=True).sets["avx2"]


def test_report() -> None:
    text = markdown(Results({"avx2": FOUND}))
    assert "### AVX2\n" in text
    assert "|1 stream, base|35.0 (30.0–40.0)|20.0|" in text
    assert "|1 stream, base|≥ 1 × llama.cpp|1.75 (1.50–2.00)|" in text
    assert "A quick run" in markdown(Results({"avx2": FOUND, "avx512": QUICK}))


def test_unmeasured_targets_are_neither_reached_nor_missed() -> None:
    assert [target.reached for target in evaluate(FOUND)] == [True, None, None]
    assert [target.reached for target in evaluate(QUICK)] == [None, None, None]


def test_server_and_peer_have_the_same_instruction_sets() -> None:
    assert set(INSTRUCTION_FLAGS) == set(TITLES)
    assert set(INSTRUCTION_FLAGS) < set(INSTRUCTIONS)
    assert {restricted(name) for name in INSTRUCTION_FLAGS} < set(MAKERS)


def test_environment_restricts_the_server(tmp_path: Path) -> None:
    config = ServerConfig(tmp_path, tmp_path, "tiny", "bf16", "cpu", 1, tmp_path / "log")
    assert "NATIVE_INSTRUCTIONS" not in config.environment
    assert replace(config, instructions="avx2").environment["NATIVE_INSTRUCTIONS"] == "avx2"


def test_unknown_instructions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--to", "avx2,sse"])
    assert "--to: no sse among avx2, avx512" in capsys.readouterr().err


@pytest.mark.slow
def test_reduced_run(tmp_path: Path) -> None:
    native_library()
    out = tmp_path / "out"
    found = main(["--quick", "--to", "avx2", "--peers", "none", "--threads", "1", "--out", str(out)])
    rows = found.sets["avx2"].rows
    assert [row.load.key for row in rows] == ["1-base", "2-distinct"]
    assert all(speed > 0 for row in rows for speed in row.speed())
    assert json.loads((out / "instruction_sets.json").read_text())["sets"]["avx2"]["made"]["quick"] is True
