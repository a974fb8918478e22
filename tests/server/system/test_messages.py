"""The prefix of suggested commands, which must run this program in the calling shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.system.messages import plural, program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a program in `.venv/bin`; none is on the PATH."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "smolora"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    return tmp_path


@pytest.mark.parametrize("called", ["{}/.venv/bin/smolora", ".venv/bin/smolora"])
def test_a_program_below_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    monkeypatch.setattr(sys, "argv", [called.format(folder)])
    assert program() == ".venv/bin/smolora"


def test_a_program_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / ".venv" / "bin")
    monkeypatch.setattr(sys, "argv", ["./smolora"])
    assert program() == "./smolora"


def test_a_program_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a b").mkdir()
    (folder / ".venv").rename(folder / "a b" / "env")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    monkeypatch.setattr(sys, "argv", ["../a b/env/bin/smolora"])
    assert program() == "'../a b/env/bin/smolora'"


def test_a_service_in_the_root_folder_keeps_the_whole_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", [str(folder / ".venv" / "bin" / "smolora")])
    assert program() == str(folder / ".venv" / "bin" / "smolora")


def test_a_program_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / ".venv" / "bin"))
    monkeypatch.setattr(sys, "argv", [str(folder / ".venv" / "bin" / "smolora")])
    assert program() == "smolora"


def test_another_program_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "smolora").write_text("#!/bin/sh\n")
    (folder / "bin" / "smolora").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setattr(sys, "argv", [str(folder / ".venv" / "bin" / "smolora")])
    assert program() == ".venv/bin/smolora"


def test_a_program_without_a_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(folder / "server" / "cli" / "__main__.py")])
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert program() == f"{folder / 'python'} -m server.cli"


def test_suggested_commands_run() -> None:
    script = [str(Path(sys.executable).with_name("smolora"))]
    failed = subprocess.run(
        [*script, "jobs", "--url", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60, check=False
    )
    assert failed.returncode == 1
    _, suggested, _ = failed.stderr.split("`")
    subprocess.run(["bash", "-c", f"{suggested} --help"], capture_output=True, timeout=60, check=True)


def test_plurals() -> None:
    found = [plural(number, "stored adapter") for number in (0, 1, 2, 1000)]
    assert found == ["0 stored adapters", "1 stored adapter", "2 stored adapters", "1,000 stored adapters"]
