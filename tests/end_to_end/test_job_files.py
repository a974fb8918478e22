"""Files that jobs leave on a real server's disk, and their removal: on request, by `smolora prune`, and
automatically."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment
from tests.end_to_end.training_client import CHILD, code_rows, get, processes, submit, succeeded, wait_until

TRAINING = {"max_steps": 4, "batch_size": 2, "max_length": 32}


def start(home: Path, base: Path, **flags: Any) -> ServerProcess:
    return ServerProcess(home, model=base, dtype="fp32", workers=1, adapter_cache_bytes="4MiB", **flags)


@pytest.fixture(scope="module")
def server(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = start(tmp_path_factory.mktemp("home"), converted_tiny)
    yield server
    server.close()


def folder(server: ServerProcess, job_id: str) -> Path:
    return server.home / "jobs" / job_id


def test_full_model_is_deleted_on_request(server: ServerProcess) -> None:
    job_id = submit(server, name="codes", data=code_rows(8), method="full", training=TRAINING)
    job = succeeded(server, job_id)
    assert {"train.safetensors", "data.json", "log.txt", "model"} <= {
        p.name for p in folder(server, job_id).iterdir()
    }
    assert server.client.get(f"/train/{job_id}/download").content.startswith(b"PK")
    report, events = (get(server, f"/train/{job_id}/{part}") for part in ("report", "events"))
    assert server.client.delete(f"/train/{job_id}").status_code == 204
    assert not folder(server, job_id).exists()
    after = get(server, f"/train/{job_id}")
    assert after.pop("files_removed_at") > job["finished_at"]
    assert after == {name: value for name, value in job.items() if name != "files_removed_at"}
    assert [get(server, f"/train/{job_id}/{part}") for part in ("report", "events")] == [report, events]
    assert server.client.get(f"/train/{job_id}/download").status_code == 404


def test_partial_checkpoint_of_a_killed_job_is_pruned(server: ServerProcess) -> None:
    """A job's process may be killed while it writes a checkpoint: the next `prune` removes the remains."""
    training = TRAINING | {"max_steps": 100_000, "checkpoint_steps": 1}
    job_id = submit(server, name="codes", data=code_rows(8), training=training)
    wait_until(lambda: bool(list(folder(server, job_id).glob("checkpoints/*-*"))))
    assert server.client.delete(f"/train/{job_id}").status_code == 409
    assert server.client.post(f"/train/{job_id}/cancel").status_code == 200
    assert server.client.delete(f"/train/{job_id}").status_code == 204
    wait_until(lambda: not processes(server, CHILD))
    assert prune(server)[-1].endswith(" removed")
    assert not folder(server, job_id).exists()


def test_pruning_while_serving_and_automatically(server: ServerProcess, converted_tiny: Path) -> None:
    """`smolora prune` runs concurrently with the server; automatic pruning is a setting."""
    ended = []
    for _ in range(2):
        ended.append(submit(server, name="codes", data=code_rows(8), training=TRAINING | {"max_steps": 100_000}))
        assert server.client.post(f"/train/{ended[-1]}/cancel").status_code == 200
        wait_until(lambda: not processes(server, CHILD))
        if len(ended) == 1:
            assert folder(server, ended[0]).exists()
            first, last = prune(server)
            assert first.startswith(f"{ended[0]}: ")
            assert last.endswith(" bytes of 1 job removed")
            assert not folder(server, ended[0]).exists()
    server.terminate()
    assert server.exit_code() == 0
    assert folder(server, ended[1]).exists()
    later = start(server.home, converted_tiny, retain_jobs=1e-6)
    try:
        wait_until(lambda: not folder(later, ended[1]).exists())
        assert all(get(later, f"/train/{job_id}")["files_removed_at"] for job_id in ended)
    finally:
        later.close()


def prune(server: ServerProcess) -> list[str]:
    """Return the output lines of `smolora prune`."""
    arguments = [command()[0], "prune", f"--home={server.home}"]
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()
