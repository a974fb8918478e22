"""Helpers for tests of jobs and workers: jobs to submit, a stub for training, and waiting."""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.jobs.jobs import Job, Jobs
from server.jobs.leases import Leases
from server.jobs.worker import Timing, Worker
from server.training.spec import JobSpec
from tests.server.jobs.stub_worker import FAST

HERE = Path(__file__).parent
STUB = (sys.executable, str(HERE / "stub_job.py"))


def submit(jobs: Jobs, job_id: str, name: str = "tweets") -> Job:
    return jobs.submit(JobSpec(name=name), job_id=job_id, data={"num_rows": 3})


def submit_stub(home: Path, jobs: Jobs, job_id: str, name: str = "tweets", **plan: object) -> Job:
    """Submit a job for the stub, which follows `plan`: see stub_job.py."""
    directory = home / "jobs" / job_id
    directory.mkdir(parents=True)
    (directory / "plan.json").write_text(json.dumps(plan))
    return submit(jobs, job_id, name)


def final_digest(num_steps: int) -> str:
    """Return the final state of the stub's steps: each state is the digest of the previous one and the step's
    number."""
    state = ""
    for step in range(1, num_steps + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    return state


def steps_done(home: Path, job_id: str) -> list[tuple[int, int, int]]:
    """Return (token, process id, step) of each step that the stub took for the job, in order."""
    path = home / "jobs" / job_id / "steps"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [(int(token), int(pid), int(step)) for token, pid, step in map(str.split, lines)]


def stays(home: Path, job_id: str, step: int) -> bool:
    """Return whether the stub waits at that step: see `stay_at` in stub_job.py."""
    path = home / "jobs" / job_id / "stays"
    return path.exists() and path.read_text() == str(step)


def until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Wait until the condition holds. Raise AssertionError on timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.04)


@contextmanager
def working(
    home: Path, jobs: Jobs, leases: Leases, timing: Timing = FAST, command: tuple[str, ...] = STUB
) -> Iterator[Worker]:
    """Run a worker on a thread of this process, stopped at the end of the block."""
    worker = Worker(home, jobs, leases, json.dumps({"home": str(home)}), command=command, timing=timing)
    thread = threading.Thread(target=worker.run, name="worker")
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
