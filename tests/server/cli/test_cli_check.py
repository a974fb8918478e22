"""`smolora check`: its table and exit code."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.config import Settings
from server.engine.backend import Backend
from server.model.base.weights import BaseModel
from server.serve import engine
from tests.kits.native import give_up, has_native, lend_native
from tests.server.engine.test_self_check import broken, faulty


def lines(home: Path, model: Path, *flags: str) -> tuple[int, list[str]]:
    """Run the command, and return its exit code and its output."""
    home.mkdir()
    lend_native(home)
    arguments = ["check", "--home", str(home), "--model", str(model), "--device", "cpu", "--threads", "1", *flags]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout.splitlines()


def test_torch_is_compared_with_itself(tiny_base_dir: Path, tmp_path: Path) -> None:
    code, found = lines(tmp_path / "home", tiny_base_dir, "--dtype", "fp32")
    assert code == 0
    assert found[0].split() == ["prompt", "values", "largest", "difference", "margin"]
    names = ["base", "cached prefix", "long prompt", "adapter", "blend", "seeded"]
    assert [line[:13].strip() for line in found[1:7]] == names
    assert found[-1].startswith("torch gives ")


def test_a_fault_is_shown(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Settings, base: BaseModel, *others: object) -> Backend:
        return faulty(base, lambda hidden: 2 * hidden)

    monkeypatch.setattr(engine, "_backend", broken)
    code, found = lines(tmp_path / "home", tiny_base_dir, "--dtype", "fp32")
    assert code == 1
    assert found[1].startswith("base ")
    assert found[1].rstrip().endswith("too large")


def test_a_backend_that_fails_is_one_line(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_backend", lambda settings, base, *others: faulty(base, broken))
    code, found = lines(tmp_path / "home", tiny_base_dir, "--dtype", "fp32")
    assert (code, found) == (1, [])


@pytest.mark.real
def test_native_code_on_the_real_base(base_dir: Path, tmp_path: Path) -> None:
    if not has_native():
        give_up("no compiler here")
    code, found = lines(tmp_path / "home", base_dir)
    assert code == 0, found
    assert found[-1] == "native gives the same bits alone and in a batch."
