"""Training jobs on a real server, as its users see them, and the processes that work on them."""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import psutil

from tests.end_to_end.server_process import PATIENCE, ServerProcess

Job = Mapping[str, Any]
ENDED = ("succeeded", "failed", "cancelled")
WORKER, CHILD = "server.jobs.worker", "server.jobs"
"""Modules run by a worker, and by the process in which it runs a job."""


def code_rows(num_rows: int = len(HTTPStatus)) -> list[dict[str, str]]:
    """Return the standard library's HTTP codes and their phrases as rows."""
    return [{"prompt": f"HTTP {s.value}:", "completion": f" {s.phrase}"} for s in list(HTTPStatus)[:num_rows]]


def submit(server: ServerProcess, **body: object) -> str:
    """Submit a job; return its id."""
    response = server.client.post("/train", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def get(server: ServerProcess, path: str) -> Any:
    """Return the answer of GET `path`."""
    response = server.client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE, what: str = "it") -> None:
    """Poll until the condition holds. Raise AssertionError on timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took too long"
        time.sleep(0.05)


def wait_for_end(server: ServerProcess, job_id: str, seconds: float = PATIENCE) -> Job:
    """Return the job once it has ended in any way. Raise AssertionError on timeout."""
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        found.update(get(server, f"/train/{job_id}"))
        return found["status"] in ENDED

    wait_until(has_ended, seconds, f"job {job_id}")
    return found


def succeeded(server: ServerProcess, job_id: str, seconds: float = PATIENCE) -> Job:
    """Return the job once it has succeeded. Raise AssertionError with its error, or with the end of the server's
    log."""
    job = wait_for_end(server, job_id, seconds)
    assert job["status"] == "succeeded", f"{job['status']}: {job['error']}\n{server.log()[-2000:]}"
    return job


def processes(server: ServerProcess, module: str) -> list[psutil.Process]:
    """Return the server's descendants that run `module`."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if module in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
