"""Jobs on a real server with a real worker: jobs that were paused or killed end like undisturbed ones.

A tiny base with a few kills and pauses: `tests.stress.kill_nine` and `tests.stress.pauses` have more.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.files import CHECKPOINTS_NAME, LOG_NAME
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows, get, submit, wait_for_end, wait_until
from tests.stress.equal_jobs import TrainingServer, start, tiny_base
from tests.stress.kill_nine import kill
from tests.stress.pauses import pause_at_random


@pytest.fixture(scope="module")
def training_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """A server on which one job has ended undisturbed."""
    training_server = TrainingServer.begin("tiny", tmp_path_factory.mktemp("training"))
    yield training_server
    training_server.server.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """The training server, on which no job has ended."""
    server = start(tmp_path / "home", tiny_base(tmp_path))
    yield server
    server.close()


@pytest.mark.slow
def test_paused_and_killed_job_ends_in_the_undisturbed_bytes(training_server: TrainingServer) -> None:
    """The job is paused, once by a SIGTERM to the worker. Then the server is killed, and its worker and job die
    too."""
    pause_at_random(training_server, 3)
    kill(training_server, "server", alone=True)
    training_server.check()


def test_failed_job_keeps_its_error_and_log(server: ServerProcess) -> None:
    """Jobs whose loss becomes NaN, and a job whose rows are another base's tokens."""
    body = {"name": "failing", "data": code_rows(4)}
    diverging = submit(server, **body, training={"learning_rate": 1e20, "warmup_ratio": 0.0})
    at_the_end = {"learning_rate": 1e38, "warmup_ratio": 0.0, "max_steps": 1}
    diverged = submit(server, **body, validation=code_rows(2), training=at_the_end)
    strange = submit(server, **body)
    stored = server.home / "jobs" / strange / "data.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"base_digest": "ab" * 32}))
    for job_id, reason, hint in (
        (diverging, "the loss is not a number", "lower training.learning_rate"),
        (diverged, "the held-out loss is not a number after step 1", "lower training.learning_rate"),
        (strange, "tokenized for another base (abababababab)", "SMOLORA_MODEL"),
    ):
        job = wait_for_end(server, job_id)
        assert job["status"] == "failed"
        assert reason in job["error"]
        assert hint in job["error"]
        assert (job["adapter"], job["attempt"]) == (None, 1)
        assert reason in read_log(server.home / "jobs" / job_id)
        assert get(server, f"/train/{job_id}/events")[-1]["level"] == "error"
    assert server.client.get("/adapters/failing").status_code == 404


def read_log(directory: Path) -> str:
    """Return the log of the job's process. Of a failed job only rows and this log are kept."""
    wait_until(lambda: not (directory / CHECKPOINTS_NAME).exists())
    return (directory / LOG_NAME).read_text(encoding="utf-8")
