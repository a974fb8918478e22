"""A wheel contains the native code for every instruction set of the machine that it is built on."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from server import __version__
from server.model.native.build import MACHINES, library_name, machine_instructions
from server.model.native.library import instructions
from tests.end_to_end.server_process import PATIENCE, free_port

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


@pytest.mark.real
@pytest.mark.parametrize("has_native", [True, False])
def test_an_installed_wheel_serves_without_a_compiler(
    has_native: bool, tmp_path: Path, base_dir: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By native code, or by torch if the wheel has none for this machine."""
    monkeypatch.setenv("COMMIT", "c0ffee" * 6 + "c0ff")
    wheel = build_wheel(tmp_path)
    site, home = tmp_path / "site", tmp_path / "home"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    if not has_native:
        shutil.rmtree(site / "server" / "model" / "native" / "prebuilt")
    port = free_port()
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(site), "OMP_WAIT_POLICY": "PASSIVE"}
    flags = [f"--home={home}", f"--model={base_dir}", f"--port={port}", "--workers=0", "--max-model-len=256"]
    command = [sys.executable, "-m", "server.cli", "serve", *flags]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            wait_until_ready(client, process, tmp_path / "log")
            assert client.get("/ready").json()["backends"] == (["native"] if has_native else ["torch"])
            body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
            assert client.post("/generate", json=body).json()["choices"][0]["text"] == " Paris"
            assert client.get("/version").json() == {"version": __version__, "commit": os.environ["COMMIT"]}
            assert client.get("/").status_code == client.get("/docs").status_code == 200
        assert not (home / "native").exists(), "nothing is compiled"
        assert "no C++ compiler" in (tmp_path / "log").read_text() or has_native
    finally:
        process.kill()
        process.wait()


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_without_a_compiler_a_wheel_is_for_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel = build_wheel(tmp_path)
    assert prebuilt_in(wheel) == set()
    assert wheel.name.endswith("-py3-none-any.whl")
