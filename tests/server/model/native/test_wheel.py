"""A wheel contains the native code for every instruction set of the machine that it is built on."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server.model.native.build import MACHINES, library_name, machine_instructions
from server.model.native.library import instructions

ROOT = Path(__file__).parents[4]
LOAD = """
from pathlib import Path
from server.model.native.library import load_library
load_library(Path("unused"), print)
"""

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("compiled")]


def build_wheel(directory: Path) -> Path:
    """Build a wheel of this checkout with what `PATH` has, and return its path."""
    source = directory / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "node_modules")
    for name in ("adapters", "server"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(directory)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


def prebuilt_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name for name in archive.namelist() if name.endswith(".so")}


def test_a_wheel_has_every_library_of_its_machine(tmp_path: Path, quick: None) -> None:
    (tmp_path / "installed").mkdir()
    wheel = build_wheel(tmp_path)
    assert prebuilt_in(wheel) == {library_name(name) for name in machine_instructions()}
    machine = wheel.stem.rpartition("-")[2]
    assert machine.startswith("linux_")
    assert wheel.name.endswith(f"-py3-none-{machine}.whl")
    assert MACHINES[machine.removeprefix("linux_")] == machine_instructions()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", LOAD]
    loaded = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert loaded.stdout == ""
    assert library_name(instructions()) in prebuilt_in(wheel)


def test_without_a_compiler_a_wheel_is_for_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel = build_wheel(tmp_path)
    assert prebuilt_in(wheel) == set()
    assert wheel.name.endswith("-py3-none-any.whl")
