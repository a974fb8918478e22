"""A real server and its worker on a disk that fills up: nothing breaks, and everything continues once there is
room."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from adapters.peft.files import write
from server.database import FILE_NAME
from server.database.file import driver
from server.model.base.weights import BaseModel
from server.storage.reserve import DISK_FULL
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment
from tests.end_to_end.training_client import code_rows, get, submit, succeeded, wait_for_end, wait_until
from tests.kits.small_disk import fill, make_room, mounted
from tests.server.jobs.merge_kit import sample

TRAINING = {"max_steps": 4, "batch_size": 2, "max_length": 32}


@pytest.fixture(scope="module")
def server(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with mounted(tmp_path_factory.mktemp("home"), 64) as home:
        server = ServerProcess(
            home, model=converted_tiny, dtype="fp32", workers=1, adapter_cache_bytes="4MiB", min_free_bytes=0
        )
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(scope="module")
def adapter(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    write(directory, sample(tiny_base.config.shape, 1))
    return directory


def leave_no_room(home: Path) -> None:
    """Fill the disk, including the reusable pages of the database's log."""
    with closing(driver.connect(home / FILE_NAME, timeout=15)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fill(home)


def upload(server: ServerProcess, directory: Path) -> httpx.Response:
    names = {"adapter_config": CONFIG, "adapter_model": WEIGHTS}
    files = {field: (name, (directory / name).read_bytes()) for field, name in names.items()}
    return server.client.post("/adapters/other", files=files)


def compose(server: ServerProcess) -> httpx.Response:
    return server.client.post("/compositions/twice", json={"expression": "kept*2"})


@pytest.mark.thorough
def test_disk_fills_up_while_a_job_checkpoints(server: ServerProcess, adapter: Path) -> None:
    home = server.home
    server.upload("kept", adapter)
    text = server.text("HTTP 404:", adapter="kept", max_tokens=8)
    training = TRAINING | {"max_steps": 100_000, "checkpoint_steps": 1}
    job_id = submit(server, name="codes", data=code_rows(8), training=training)
    wait_until(lambda: bool(list((home / "jobs" / job_id).glob("checkpoints/*-*"))))
    fill(home)
    job = wait_for_end(server, job_id)
    assert (job["status"], job["error"], job["adapter"]) == ("failed", DISK_FULL, None)
    wait_until(lambda: not (home / "jobs" / job_id / "checkpoints").exists())

    leave_no_room(home)
    for refused in (upload(server, adapter), compose(server)):
        assert refused.status_code == 503, refused.text
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["detail"] == "the server's disk is full"
        assert int(refused.headers["retry-after"]) >= 1
    assert [found["name"] for found in get(server, "/adapters")["adapters"]] == ["kept"]
    assert server.client.get("/ready").status_code == 200
    assert server.text("HTTP 404:", adapter="kept", max_tokens=8) == text

    make_room(home)
    assert (upload(server, adapter).status_code, compose(server).status_code) == (201, 201)
    again = succeeded(server, submit(server, name="codes", data=code_rows(8), training=TRAINING))
    assert again["adapter"]["version"] == 1
    doctor = [command()[0], "doctor", f"--home={home}"]
    found = subprocess.run(doctor, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 0, found.stdout
