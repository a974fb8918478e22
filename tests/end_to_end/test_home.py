"""A real server's HOME and keys are private to their owner, while the server runs and after a kill."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end import server_process
from tests.end_to_end.server_process import ServerProcess, command
from tests.end_to_end.test_processes import last_line
from tests.end_to_end.training_client import CHILD, WORKER, code_rows, processes, submit, wait_until

KEY = "a-key-that-nobody-sees"


def start(home: Path, base: Path) -> ServerProcess:
    return ServerProcess(
        home, key=KEY, api_keys=KEY, model=base, dtype="fp32", workers=1, adapter_cache_bytes="4MiB"
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a HOME made by an older server."""
    home = tmp_path_factory.mktemp("served")
    home.chmod(0o755)
    return home


@pytest.fixture(scope="module")
def server(home: Path, converted_tiny: Path) -> Iterator[ServerProcess]:
    server = start(home, converted_tiny)
    yield server
    server.close()


def test_home_is_closed_to_other_users(server: ServerProcess) -> None:
    assert server.home.stat().st_mode & 0o7777 == 0o700


def test_files_are_private_to_their_owner(server: ServerProcess) -> None:
    """This includes files that a worker writes, and holds whatever mode HOME gets later."""
    training = {"max_steps": 1, "batch_size": 2, "max_length": 32}
    job_id = submit(server, name="private", data=code_rows(8), training=training)
    wait_until(lambda: server.client.get(f"/train/{job_id}").json()["status"] == "succeeded")
    native = server.home / "native"  # code, which an image's other users run too
    paths = {
        path for path in server.home.rglob("*") if path not in (native, server.home / "log", *native.rglob("*"))
    }
    assert {path.name for path in paths} > {"smolora.db", "train.safetensors", "log.txt", "state.json", "1.json"}
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
    server.client.delete("/adapters/private").raise_for_status()


def test_keys_are_not_visible_to_other_processes(server: ServerProcess) -> None:
    """Keys appear neither in `ps` nor in the environment of a worker or of a job's process."""
    training = {"max_steps": 100_000, "batch_size": 2, "max_length": 32}
    job_id = submit(server, name="codes", data=code_rows(8), training=training)
    wait_until(lambda: bool(processes(server, CHILD)))
    assert KEY not in " ".join(psutil.Process(server.process.pid).cmdline())
    for process in processes(server, WORKER) + processes(server, CHILD):
        assert KEY not in " ".join(process.cmdline()), process
        assert KEY not in str(process.environ()), process
    assert server.client.post(f"/train/{job_id}/cancel").status_code == 200


@pytest.mark.parametrize("keys", [{}, pytest.param({"api_keys": KEY}, marks=pytest.mark.thorough)])
def test_client_key_in_a_servers_environment_warns(
    keys: dict[str, str], tmp_path: Path, converted_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable may have been meant as the server's key: a server without keys warns of it."""
    given = {**server_process.environment(), "SMOLORA_API_KEY": "sent"}
    monkeypatch.setattr(server_process, "environment", lambda: given)
    server = ServerProcess(tmp_path, key=keys.get("api_keys"), model=converted_tiny, dtype="fp32", **keys)
    try:
        warning = "SMOLORA_API_KEY is what commands send: no API key is asked for"
        wait_until(lambda: "curl -s" in server.log() and (warning in server.log()) is not bool(keys), what=warning)
        server.generate("a", max_tokens=1)
        assert (warning in server.log()) is not bool(keys)
    finally:
        server.close()


def test_second_server_is_refused_until_the_first_is_killed(
    server: ServerProcess, home: Path, converted_tiny: Path
) -> None:
    """kill -9 hits the server alone: its child processes may live on for a moment."""
    line = last_line(command(home=home, port=0, model=converted_tiny))
    assert line.startswith(f"smolora: SMOLORA_HOME={home} is served already, by process {server.process.pid} on ")
    assert "--home" in line
    assert server.client.get("/ready").status_code == 200
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    again = start(home, converted_tiny)
    try:
        assert again.client.get("/adapters").json()["adapters"] == []
    finally:
        again.close()
