"""Workers and the processes of jobs: ended by will or by force, each job ends once, in the same state."""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog, Part
from adapters.merge_recipe import Recipe
from adapters.names import Viewpoint
from server.access.principal import Quota
from server.access.projects import Projects
from server.database import connect
from server.database.file import driver
from server.jobs.jobs import Job, Jobs, Status
from server.jobs.leases import MAX_STALLED_ATTEMPTS, Leases
from server.jobs.merge_spec import MergeSpec
from server.jobs.pipe import EXIT_NO_BASE, EXIT_NO_DATABASE, EXIT_NO_ROOM, EXIT_NO_STORE
from server.jobs.worker import Timing, Worker
from server.storage.reserve import DISK_FULL, FILE_NAME, Reserve
from tests.server.jobs.job_kit import STUB, final_digest, stays, steps_done, submit_stub, until, working
from tests.server.jobs.stub_worker import FAST

WORKER = ("-m", "tests.server.jobs.stub_worker")
ROOT = Path(__file__).parents[3]

NO_BASE_EVENT = (
    sys.executable,
    "-S",
    "-c",
    """
import json, os, sys
reason = json.dumps({"reason": "SMOLORA_MODEL=/srv/base: not there"})
os.write(json.loads(sys.argv[-1])["pipe"], reason.encode() + b"\\n")
sys.exit(78)
""",
)
"""A job's process that has nothing to train on."""

HINDERED = {
    code: (sys.executable, "-S", "-c", f"raise SystemExit({code})")
    for code in (EXIT_NO_DATABASE, EXIT_NO_STORE, EXIT_NO_ROOM)
}
"""Jobs' processes that something stands in the way of, by their exit code."""

LIGHT = """
import json, sqlite3, sys
assignment = json.loads(sys.argv[-1])
home, job_id = json.loads(assignment["settings"])["home"], assignment["job_id"]
with open(f"{home}/runs", "a") as file:
    file.write(job_id + "\\n")
claim = job_id, assignment["token"]
with sqlite3.connect(f"{home}/smolora.db", timeout=15) as database:
    database.execute("UPDATE jobs SET status = 'succeeded' WHERE id = ? AND token = ?", claim)
"""
"""A job that notes that it ran, and ends: it takes milliseconds."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(tmp_path)
    yield engine
    engine.dispose()


def exit_code(home: Path, jobs: Jobs, leases: Leases, command: tuple[str, ...]) -> int:
    """Of a worker that ends by itself."""
    worker = Worker(home, jobs, leases, json.dumps({"home": str(home)}), command=command, timing=FAST)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(worker.run()), daemon=True)
    thread.start()
    try:
        until(lambda: codes)
    finally:
        worker.stop()
        thread.join(60)
    return codes[0]


def make_attempts(
    home: Path,
    jobs: Jobs,
    leases: Leases,
    count: int,
    timing: Timing = FAST,
    command: tuple[str, ...] = STUB,
) -> None:
    """Have one worker make `count` attempts on this thread; return once the last one has ended.

    A test that waits for the second attempt of a job that always dies may miss it: the third follows 0.1 s later.
    """
    timing = replace(timing, max_crash_delay=0.0)  # else the worker finds no job to claim
    worker = Worker(home, jobs, leases, json.dumps({"home": str(home)}), command=command, timing=timing)
    for _ in range(count):
        worker._work()


@contextmanager
def worker_process(
    home: Path, command: tuple[str, ...] = STUB, lease: float = 1.5
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of its own process, killed at the end if it still runs."""
    arguments = [sys.executable, *WORKER, str(home), str(os.getpid()), str(lease), *command]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def child_of(home: Path, job_id: str) -> int:
    """The process that did the job's last step."""
    return steps_done(home, job_id)[-1][1]


def stop(home: Path, *pids: int) -> None:
    """SIGSTOP, at a moment when they don't hold the database's lock, with which they would stop everybody."""
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: all(map(has_stopped, pids)))  # a thread that is in a system call may get the lock by it
        database = driver.connect(home / "smolora.db", timeout=0.1)
        with closing(database), suppress(driver.OperationalError):
            database.execute("BEGIN IMMEDIATE")
            return
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def has_stopped(pid: int) -> bool:
    """Whether all of its threads have, a moment after SIGSTOP."""
    try:
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # one has just ended
        return False
    return {text.rpartition(")")[2].split()[0] for text in threads} == {"T"}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def check_published_once(jobs: Jobs, engine: sa.Engine, job_id: str, num_steps: int) -> Job:
    """The job ended as an undisturbed one does, and no step's metrics are there twice."""
    job = jobs.get(job_id)
    assert job.status is Status.SUCCEEDED
    versions = [version for adapter in Catalog(engine).list() for version in adapter.versions]
    (mine,) = [version for version in versions if version.job_id == job_id]
    assert mine.digest == final_digest(num_steps)
    published = {"name": mine.name, "version": mine.version, "digest": mine.digest, "moves_latest": True}
    assert job.adapter == published
    steps = [event.data["step"] for event in jobs.events(job_id, limit=10_000) if event.type == "metrics"]
    assert steps == list(range(1, num_steps + 1))
    return job


def step_of(job: Job) -> int:
    step = job.progress.get("step", 0)
    assert isinstance(step, int)
    return step


def has_done(home: Path, num_steps: int, job_id: str = "j1") -> bool:
    """Whether the job has done as many, those that were done again counted again."""
    return len(steps_done(home, job_id)) >= num_steps


def has_begun(jobs: Jobs, job_id: str, token: int) -> bool:
    """Whether that attempt has begun, and perhaps later ones."""
    return jobs.get(job_id).attempt >= token


def is_paused(jobs: Jobs, job_id: str) -> bool:
    return jobs.get(job_id).status is Status.PAUSED


def has_ended(jobs: Jobs, job_id: str) -> bool:
    return jobs.get(job_id).status.has_ended


def have_gone(checkpoints: Path) -> bool:
    return not checkpoints.exists()


def is_gone(process_id: int) -> bool:
    return not is_alive(process_id)


def test_a_job_is_worked_on_and_published(tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=30, every=10)
    with working(tmp_path, jobs, leases):
        until(lambda: jobs.get("j1").status.has_ended)
        until(lambda: not (tmp_path / "jobs/j1/checkpoints").exists())
    job = check_published_once(jobs, engine, "j1", 30)
    assert (job.attempt, job.progress, job.metrics) == (1, {"step": 30, "total_steps": 30}, {"train_loss": 1 / 30})
    assert [step for _, _, step in steps_done(tmp_path, "j1")] == list(range(1, 31))
    assert (tmp_path / "jobs/j1/log.txt").read_text() == "attempt 1 speaking\n"
    assert (tmp_path / FILE_NAME).stat().st_size == 1 << 20


def test_progress_shows_while_it_runs(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=10_000, seconds=0.01, every=10_000)
    with working(tmp_path, jobs, leases):
        until(lambda: step_of(jobs.get("j1")) > 20)
        job = jobs.get("j1")
        assert job.progress["total_steps"] == 10_000
        loss = job.metrics["train_loss"]
        assert isinstance(loss, float)
        assert 0 < loss < 0.1
        jobs.cancel("j1")


@pytest.mark.slow
def test_killed_at_random_it_ends_as_if_undisturbed(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases
) -> None:
    """SIGKILL to the process of the job, or to the worker, whose process must then die as well."""
    num_steps, rng = 200, random.Random(1)
    submit_stub(tmp_path, jobs, "j1", steps=num_steps, seconds=0.01, every=7, hold=True)  # it outlasts the kills
    kills = ["worker", "child"] * 2
    rng.shuffle(kills)
    for kill in kills:
        with worker_process(tmp_path) as worker:
            seen = len(steps_done(tmp_path, "j1"))
            until(partial(has_done, tmp_path, seen + 1))
            time.sleep(rng.uniform(0, 0.15))
            token, child, _ = steps_done(tmp_path, "j1")[-1]
            if kill == "child":
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                until(partial(has_begun, jobs, "j1", token + 1))
            worker.kill()
            until(partial(is_gone, child), 2.0)
    assert jobs.get("j1").status is Status.RUNNING
    (tmp_path / "jobs/j1/go").touch()
    with worker_process(tmp_path):
        until(lambda: jobs.get("j1").status.has_ended)
    job = check_published_once(jobs, engine, "j1", num_steps)
    assert job.attempt >= 5
    assert job.error is None
    for token in range(1, job.attempt + 1):  # each attempt goes on from a checkpoint of those before
        mine = [step for other, _, step in steps_done(tmp_path, "j1") if other == token]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
        assert not mine or mine[0] % 7 == 1


@pytest.mark.parametrize("where", [pytest.param("between steps", marks=pytest.mark.thorough), "before publishing"])
def test_a_stopped_worker_cant_publish_when_it_wakes(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases, where: str
) -> None:
    """SIGSTOP to the worker and its process, past the lease; another worker ends the job; SIGCONT."""
    late = where == "before publishing"
    num_steps = 20 if late else 60
    where_it_stays: dict[str, Any] = {"hold": True} if late else {"seconds": 0.02, "stay_at": [9]}
    submit_stub(tmp_path, jobs, "j1", steps=num_steps, every=5, **where_it_stays)
    with worker_process(tmp_path) as worker:
        until(lambda: has_done(tmp_path, num_steps) if late else stays(tmp_path, "j1", 9))
        child = child_of(tmp_path, "j1")
        stop(tmp_path, worker.pid, child)
        (tmp_path / "jobs/j1/go").touch()
        with working(tmp_path, jobs, leases):
            until(lambda: jobs.get("j1").status.has_ended)
            before = check_published_once(jobs, engine, "j1", num_steps), jobs.events("j1")
            assert before[0].attempt == 2
            os.kill(child, signal.SIGCONT)
            os.kill(worker.pid, signal.SIGCONT)
            until(lambda: not is_alive(child))
        assert (check_published_once(jobs, engine, "j1", num_steps), jobs.events("j1")) == before
        submit_stub(tmp_path, jobs, "j2", steps=3)  # the worker itself is as good as ever
        until(lambda: jobs.get("j2").status.has_ended)
        check_published_once(jobs, engine, "j2", 3)


@pytest.mark.thorough
def test_a_worker_that_was_stopped_alone_stops_what_runs(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases
) -> None:
    """Its process goes on without it, until it learns from the database that the job is another's."""
    submit_stub(tmp_path, jobs, "j1", steps=100, seconds=0.02, every=5, stay_at=[50])
    with worker_process(tmp_path) as worker:
        until(lambda: len(steps_done(tmp_path, "j1")) >= 8)
        child = child_of(tmp_path, "j1")
        stop(tmp_path, worker.pid)
        with working(tmp_path, jobs, leases):
            until(lambda: jobs.get("j1").attempt == 2)
            (tmp_path / "jobs/j1/go").touch()
            until(lambda: not is_alive(child))
            until(lambda: jobs.get("j1").status.has_ended)
        check_published_once(jobs, engine, "j1", 100)


@pytest.mark.thorough  # who gets a job: queue/test_jobs.py
def test_two_workers_and_fifty_jobs(tmp_path: Path, jobs: Jobs) -> None:
    for i in range(50):
        submit_stub(tmp_path, jobs, f"j{i}")
    command = (sys.executable, "-S", "-c", LIGHT)
    with worker_process(tmp_path, command, 30), worker_process(tmp_path, command, 30):
        until(lambda: all(job.status is Status.SUCCEEDED for job in jobs.list()))
    assert sorted((tmp_path / "runs").read_text().split()) == sorted(f"j{i}" for i in range(50))
    assert {job.attempt for job in jobs.list()} == {1}


def test_pause_and_resume_give_the_undisturbed_result(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases
) -> None:
    took: dict[int, list[float]] = {20: [], 40: []}  # of its first attempt, and of one that was resumed
    with working(tmp_path, jobs, leases):
        for number in range(10):  # others use the machine, for seconds at a time
            job_id, other = f"j{number}", f"other{number}"
            submit_stub(tmp_path, jobs, job_id, steps=60, seconds=0.01, every=1000, stay_at=list(took))
            submit_stub(tmp_path, jobs, other, steps=1)
            for place, seconds in took.items():
                until(partial(stays, tmp_path, job_id, place))
                start = time.monotonic()
                jobs.pause(job_id)
                until(partial(is_paused, jobs, job_id))
                seconds.append(time.monotonic() - start)
                assert jobs.get(job_id).progress["step"] == steps_done(tmp_path, job_id)[-1][2]
                until(partial(has_ended, jobs, other))  # the worker was free
                jobs.resume(job_id)
            until(partial(has_ended, jobs, job_id))
            assert check_published_once(jobs, engine, job_id, 60).attempt == 3
            done = [step for _, _, step in steps_done(tmp_path, job_id)]
            assert done == list(range(1, 61)), "no step was done twice"
            if all(min(seconds) < 3.0 for seconds in took.values()):
                break
    assert all(min(seconds) < 3.0 for seconds in took.values()), took


def test_a_job_that_gives_way_ends_in_the_undisturbed_state(tmp_path: Path, engine: sa.Engine, jobs: Jobs) -> None:
    """One worker, and one-step jobs of another project. No step is done twice."""
    Projects(engine).put("other", Quota(), who="test")
    other = jobs.of(Viewpoint("other"))
    submit_stub(tmp_path, jobs, "j1", steps=60, every=1000, stay_at=[20, 40])
    with working(tmp_path, jobs, Leases(engine, time_slice=0.05)):
        for place in (20, 40):
            until(partial(stays, tmp_path, "j1", place))
            submit_stub(tmp_path, other, short := f"o{place}", steps=1)
            until(partial(has_ended, other, short))
            assert not jobs.get("j1").status.has_ended
        until(partial(has_ended, jobs, "j1"))
    assert check_published_once(jobs, engine, "j1", 60).attempt == 3
    assert [step for _, _, step in steps_done(tmp_path, "j1")] == list(range(1, 61))
    messages = [event.message for event in jobs.events("j1", limit=1000) if event.type == "message"]
    gave_way = [message for message in messages if message.startswith("gave way to another project's job after ")]
    assert len(gave_way) == 2


def test_cancel_ends_what_runs(tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases) -> None:
    took = []
    with working(tmp_path, jobs, leases):
        for job_id in ("j1", "j2", "j3"):  # others use the machine, for seconds at a time
            submit_stub(tmp_path, jobs, job_id, steps=10_000, seconds=0.01, every=5)
            until(partial(has_done, tmp_path, 9, job_id))
            (model := tmp_path / "jobs" / job_id / "model").mkdir()
            start = time.monotonic()
            assert jobs.cancel(job_id).status is Status.CANCELLED
            until(partial(is_gone, child_of(tmp_path, job_id)))
            took.append(time.monotonic() - start)
            until(partial(have_gone, tmp_path / "jobs" / job_id / "checkpoints"))
            until(partial(have_gone, model))
            if took[-1] < 3.0:
                break
    assert min(took) < 3.0, took
    assert {job.status for job in jobs.list()} == {Status.CANCELLED}
    assert Catalog(engine).list() == []


def test_a_job_that_runs_too_long_is_ended(tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases) -> None:
    with working(tmp_path, jobs, leases):
        submit_stub(tmp_path, jobs, "j1", steps=100_000, seconds=0.01, every=5)
        until(partial(has_done, tmp_path, 9, "j1"))
        child = child_of(tmp_path, "j1")
        Projects(engine).put("default", Quota(max_job_seconds=1), who="test")
        until(partial(is_gone, child))
        until(partial(have_gone, tmp_path / "jobs" / "j1" / "checkpoints"))
    job = jobs.get("j1")
    assert (job.status, "longer than 1 s" in str(job.error)) == (Status.FAILED, True)


def test_a_stopped_worker_puts_its_job_back(tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases) -> None:
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id, steps=40, seconds=0.02, every=1000, stay_at=[20])
    with worker_process(tmp_path, lease=30) as worker:
        until(lambda: stays(tmp_path, "j1", 20))
        worker.terminate()
        assert worker.wait(60) == 0
    job = jobs.get("j1")
    assert (job.status, job.position) == (Status.QUEUED, 1)
    with working(tmp_path, jobs, leases):
        until(lambda: jobs.get("j1").status.has_ended)
        assert jobs.get("j2").status is not Status.SUCCEEDED
    assert [step for _, _, step in steps_done(tmp_path, "j1")] == list(range(1, 41))
    check_published_once(jobs, engine, "j1", 40)


def test_what_wont_leave_is_killed(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=10_000, seconds=0.01, every=10, deaf=True)
    with working(tmp_path, jobs, leases, replace(FAST, pause=0.5)):
        until(lambda: len(steps_done(tmp_path, "j1")) > 15)
        jobs.pause("j1")
        until(lambda: jobs.get("j1").status is Status.PAUSED)
        assert not is_alive(child_of(tmp_path, "j1"))
    assert (tmp_path / "jobs/j1/checkpoints").exists()


def test_a_hung_step_is_ended(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=30, every=10, hang_at=25)
    make_attempts(tmp_path, jobs, leases, 1, replace(FAST, hung=1.5))
    assert jobs.get("j1").status is Status.QUEUED
    warnings = [event.message for event in jobs.events("j1") if event.level == "warning"]
    assert warnings == ["attempt 1: no sign of progress for 1.5 s"]


@pytest.mark.thorough  # what beats meanwhile: test_job_reporter.py
def test_a_long_write_is_no_hang(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    """As long as its bytes may take. A busy machine may need seconds to start a process, which are quiet, too."""
    submit_stub(tmp_path, jobs, "j1", steps=3, transfer=25.0, transfer_at_most=90.0)
    with working(tmp_path, jobs, leases, replace(FAST, hung=15.0)):
        until(lambda: jobs.get("j1").status.has_ended)
    assert (jobs.get("j1").status, jobs.get("j1").attempt) == (Status.SUCCEEDED, 1)


def test_a_write_that_takes_longer_than_its_bytes_may_is_ended(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=3, transfer=1000.0, transfer_at_most=0.5)
    make_attempts(tmp_path, jobs, leases, 1, replace(FAST, hung=1.5))
    assert jobs.get("j1").status is Status.QUEUED
    warnings = [event.message for event in jobs.events("j1") if event.level == "warning"]
    assert warnings == ["attempt 1: no sign of progress for 1.5 s"]


def test_a_crash_is_not_the_end(tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=30, every=10, crash_at=25)
    with working(tmp_path, jobs, leases):
        until(lambda: jobs.get("j1").status.has_ended)
    check_published_once(jobs, engine, "j1", 30)
    assert "attempt 1: ended with exit code 3" in [event.message for event in jobs.events("j1")]
    assert [step for token, _, step in steps_done(tmp_path, "j1") if token == 2] == list(range(21, 31))


def test_job_that_always_crashes_fails_with_its_log(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1")
    command = (sys.executable, "-S", "-c", "import sys; sys.exit('a reason')")
    with working(tmp_path, jobs, leases, replace(FAST, max_crash_delay=0.0), command):
        until(lambda: jobs.get("j1").status.has_ended)
    job = jobs.get("j1")
    assert (job.status, job.attempt) == (Status.FAILED, 25)
    assert job.error == "25 attempts in a row made no new checkpoint; the last one: ended with exit code 1"
    assert (tmp_path / "jobs/j1/log.txt").read_text() == "a reason\n" * 25


def test_who_has_succeeded_may_tidy_up(
    tmp_path: Path, jobs: Jobs, leases: Leases, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker looks at what is wanted of it many times meanwhile."""
    caplog.set_level(logging.INFO, "smolora.worker")
    submit_stub(tmp_path, jobs, "j1", steps=3, linger=0.5)
    with working(tmp_path, jobs, leases):
        until(lambda: "job j1: succeeded" in caplog.messages)
    assert (tmp_path / "jobs/j1/tidy").exists()


def test_who_has_succeeded_may_not_linger_for_ever(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=3, linger=1000)
    submit_stub(tmp_path, jobs, "j2", name="j2", steps=3)
    with working(tmp_path, jobs, leases, replace(FAST, pause=0.3, hung=1000.0)):
        until(lambda: jobs.get("j2").status is Status.SUCCEEDED)
    assert jobs.get("j1").status is Status.SUCCEEDED


def test_a_worker_without_a_base_takes_no_more_jobs(
    tmp_path: Path, jobs: Jobs, leases: Leases, caplog: pytest.LogCaptureFixture
) -> None:
    """It says why, where only its operator reads it. What it had goes back, and didn't count as an attempt."""
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id)
    for attempt in range(1, 31):
        assert exit_code(tmp_path, jobs, leases, NO_BASE_EVENT) == EXIT_NO_BASE
        assert "SMOLORA_MODEL=/srv/base: not there" in caplog.messages[-1]
        assert (jobs.get("j1").status, jobs.get("j1").attempt, jobs.get("j1").position) == (
            Status.QUEUED,
            attempt,
            1,
        )
    assert (jobs.get("j2").status, jobs.get("j2").attempt) == (Status.QUEUED, 0)
    events = jobs.events("j1")
    assert [event.level for event in events].count("warning") == 30
    assert not any("/srv" in event.message for event in events)
    assert any("can't load the base" in event.message for event in events)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", "ended without a result"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, as Linux does where memory runs out"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        (None, "could not start: No such file or directory"),
    ],
)
def test_other_ways_to_end_badly(
    tmp_path: Path, jobs: Jobs, leases: Leases, code: str | None, reason: str
) -> None:
    submit_stub(tmp_path, jobs, "j1")
    command = ("/nowhere/python",) if code is None else (sys.executable, "-S", "-c", code)
    make_attempts(tmp_path, jobs, leases, 2, command=command)
    warnings = [event.message for event in jobs.events("j1") if event.level == "warning"]
    assert warnings == [f"attempt 1: {reason}", f"attempt 2: {reason}"]
    assert (jobs.get("j1").status, jobs.get("j1").attempt) == (Status.QUEUED, 2)


def test_a_full_disk_fails_the_job_with_that_reason(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=30, every=10, full=15)
    with working(tmp_path, jobs, leases):
        until(lambda: jobs.get("j1").status.has_ended)
        until(lambda: not (tmp_path / "jobs/j1/checkpoints").exists())
    assert (jobs.get("j1").status, jobs.get("j1").error) == (Status.FAILED, DISK_FULL)


def test_a_full_disk_fails_no_job_that_another_machine_may_have(
    tmp_path: Path, jobs: Jobs, leases: Leases, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker finds no room for its process's log; and takes no further one."""
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id, steps=30, every=10)
    worker = Worker(
        *(tmp_path, jobs, leases, json.dumps({"home": str(tmp_path)})),
        command=STUB,
        timing=replace(FAST, hindered=5.0),
        has_peers=True,
    )
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Mock(side_effect=full))
        worker._work()
    assert [event.message for event in jobs.events("j1")][-2:] == [
        "attempt 1: its worker's disk is full",
        "back in the queue",
    ]
    monkeypatch.setattr(Reserve, "is_needed", True)
    worker._work()
    assert "takes no jobs" in caplog.messages[-1]
    assert [(job.status, job.attempt) for job in jobs.list()] == [(Status.QUEUED, 0), (Status.QUEUED, 1)]


def test_a_worker_that_cant_fill_its_reserve_says_what_may_be_wrong(
    tmp_path: Path, jobs: Jobs, leases: Leases, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that became read-only isn't full."""
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("server.storage.reserve.new_file", Mock(side_effect=read_only))
    Worker(tmp_path, jobs, leases, "{}", timing=FAST, has_peers=True)._work()
    assert caplog.messages == ["SMOLORA_HOME has no room, or can't be written: this worker takes no jobs"]


def test_a_hindered_job_lets_others_go_first(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id)
    timing = replace(FAST, hindered=0.1, poll=5.0)
    worker = Worker(tmp_path, jobs, leases, "{}", command=HINDERED[EXIT_NO_STORE], timing=timing)
    worker._work()
    worker._work()
    assert [job.attempt for job in jobs.list()] == [1, 1]


@pytest.mark.parametrize("code", [EXIT_NO_DATABASE, EXIT_NO_STORE, EXIT_NO_ROOM])
def test_a_job_that_finds_room_nowhere_fails(tmp_path: Path, jobs: Jobs, leases: Leases, code: int) -> None:
    """Not one that the database or the store is in the way of: they will be there again."""
    submit_stub(tmp_path, jobs, "j1")
    timing = replace(FAST, hindered=0.0, poll=0.0)
    worker = Worker(tmp_path, jobs, leases, "{}", command=HINDERED[code], timing=timing, has_peers=True)
    for _ in range(MAX_STALLED_ATTEMPTS + 1):
        worker._work()
    job = jobs.get("j1")
    if code == EXIT_NO_ROOM:
        assert (job.status, job.attempt) == (Status.FAILED, MAX_STALLED_ATTEMPTS)
        assert job.error == f"25 attempts in a row made no new checkpoint; the last one: {DISK_FULL}"
    else:
        assert (job.status, job.attempt) == (Status.QUEUED, MAX_STALLED_ATTEMPTS + 1)


@pytest.mark.parametrize("has_bucket", [False, pytest.param(True, marks=pytest.mark.cluster)])
def test_a_machine_of_a_cluster_with_a_full_disk_leaves_its_jobs_to_others(
    tmp_path: Path, database_url: str | None, has_bucket: bool
) -> None:
    """One whose database and bytes are elsewhere: else all workers have its HOME, and no more room than it."""
    environment = dict(os.environ)
    if has_bucket:
        pytest.importorskip("obstore")
        environment["SMOLORA_BYTES_URL"] = f"file://{tmp_path}/bytes"
    if database_url is not None:
        environment["SMOLORA_DATABASE_URL"] = database_url
    engine = connect(tmp_path, url=database_url)
    jobs = Jobs(engine)
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id)
    checkpoint = tmp_path / "jobs/j1/checkpoints/1-10"
    checkpoint.mkdir(parents=True)
    is_machine = has_bucket and database_url is not None
    last = "back in the queue" if is_machine else DISK_FULL
    command = [sys.executable, "-c", RUN_WORKER, str(tmp_path), *HINDERED[EXIT_NO_ROOM]]
    worker = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        until(lambda: last in [event.message for event in jobs.events("j1")])
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
    if is_machine:
        assert [event.message for event in jobs.events("j1")][-2] == "attempt 1: its worker's disk is full"
        assert [(job.status, job.attempt) for job in jobs.list()] == [(Status.QUEUED, 0), (Status.QUEUED, 1)]
        assert checkpoint.exists()
    else:
        assert (jobs.get("j1").status, jobs.get("j1").error) == (Status.FAILED, DISK_FULL)
    engine.dispose()


def test_leftovers_of_ended_jobs_go(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    for job_id in ("waiting", "ended"):
        submit_stub(tmp_path, jobs, job_id)
        jobs.pause(job_id)
    jobs.cancel("ended")
    for name in ("waiting", "ended", "old orphan", "new orphan"):
        (tmp_path / "jobs" / name / "checkpoints/1-5").mkdir(parents=True)
    os.utime(tmp_path / "jobs/old orphan", (0, 0))
    with working(tmp_path, jobs, leases):
        until(lambda: not (tmp_path / "jobs/old orphan").exists())
    assert (tmp_path / "jobs/waiting/checkpoints/1-5").exists()
    assert (tmp_path / "jobs/new orphan/checkpoints/1-5").exists()
    assert not (tmp_path / "jobs/ended/checkpoints").exists()
    assert (tmp_path / "jobs/ended/plan.json").exists()


def test_files_removed_on_another_machine_are_removed_here(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    """A machine that has no server: those of others remove what is in their own HOMEs, and in the bucket."""
    home = tmp_path / "machine"
    for job_id in ("before", "meanwhile", "kept"):
        submit_stub(home, jobs, job_id)
        (home / "jobs" / job_id / "log.txt").write_text("it went well")
        jobs.cancel(job_id)
    jobs.remove_files("before")
    with working(home, jobs, leases, replace(FAST, sweep=0.1)):
        until(lambda: not (home / "jobs/before").exists())
        jobs.remove_files("meanwhile")
        until(lambda: not (home / "jobs/meanwhile").exists())
    assert (home / "jobs/kept/log.txt").exists()


def test_a_start_among_many_folders_asks_little(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for many jobs at once, here for 10 instead of 500."""
    monkeypatch.setattr("server.jobs.files._AT_ONCE", 10)
    for number in range(12):
        submit_stub(tmp_path, jobs, f"ended-{number}")
        jobs.cancel(f"ended-{number}")
        os.utime(tmp_path / f"jobs/ended-{number}", (0, 0))
    asked: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    worker = Worker(tmp_path, jobs, leases, "{}", timing=FAST)
    worker.stop()  # it does what comes before the first claim
    worker.run()
    assert len(asked) <= 3
    assert len(list((tmp_path / "jobs").iterdir())) == 12


def test_checkpoints_go_also_where_no_worker_ends_the_job(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases
) -> None:
    """It is cancelled while it is paused, or failed by a claim as no attempt gets further. The worker lives on."""

    def checkpoints(job_id: str) -> Path:
        return tmp_path / "jobs" / job_id / "checkpoints"

    def pause_halfway(job_id: str) -> None:
        submit_stub(tmp_path, jobs, job_id, job_id, steps=60, seconds=0.02, every=5, stay_at=[9])
        until(lambda: stays(tmp_path, job_id, 9))
        jobs.pause(job_id)
        until(lambda: jobs.get(job_id).status is Status.PAUSED)
        assert any(checkpoints(job_id).iterdir())

    with working(tmp_path, jobs, leases, replace(FAST, sweep=0.1)):
        for job_id in ("cancelled", "stalled", "kept"):
            pause_halfway(job_id)
        jobs.cancel("cancelled")
        with engine.begin() as connection:
            stalled = sa.text("UPDATE jobs SET stalled_attempts = :most WHERE id = 'stalled'")
            connection.execute(stalled.bindparams(most=MAX_STALLED_ATTEMPTS))
        jobs.resume("stalled")
        until(lambda: not checkpoints("cancelled").exists() and not checkpoints("stalled").exists())
        assert jobs.get("stalled").status is Status.FAILED
        assert any(checkpoints("kept").iterdir()), "its job may be resumed"
        jobs.resume("kept")
        until(lambda: jobs.get("kept").status.has_ended)
    check_published_once(jobs, engine, "kept", 60)
    assert [step for _, _, step in steps_done(tmp_path, "kept")] == list(range(1, 61)), "from its checkpoint"


RUN_WORKER = """
import sys
from pathlib import Path
from server.config import WorkerSettings
from server.jobs.worker import run_worker
sys.exit(run_worker(WorkerSettings(home=Path(sys.argv[1])), command=sys.argv[2:]))
"""


def submit_merge(home: Path, jobs: Jobs, job_id: str, **plan: float) -> Job:
    directory = home / "jobs" / job_id
    directory.mkdir(parents=True)
    (directory / "plan.json").write_text(json.dumps(plan))
    parts = tuple(Part(name, 1, digest * 64, 1.0) for name, digest in (("a", "0"), ("b", "1")))
    spec = MergeSpec("merged", parts, Recipe("svd", 1.0, 0, None))
    return jobs.submit(spec, job_id=job_id, data={"total_steps": 3})


@pytest.mark.thorough
def test_training_and_merges_do_not_wait_for_each_other(tmp_path: Path, jobs: Jobs) -> None:
    submit_stub(tmp_path, jobs, "t1", steps=100_000, seconds=0.02)
    submit_merge(tmp_path, jobs, "m1", steps=3)
    submit_merge(tmp_path, jobs, "m2", steps=100_000, seconds=0.02)
    submit_merge(tmp_path, jobs, "m3", steps=3)
    submit_stub(tmp_path, jobs, "t2", steps=3)
    worker = subprocess.Popen([sys.executable, "-c", RUN_WORKER, str(tmp_path), *STUB], cwd=ROOT)
    try:
        until(lambda: jobs.get("m1").status is Status.SUCCEEDED and steps_done(tmp_path, "m2"))
        assert jobs.get("t1").status is Status.RUNNING
        jobs.cancel("t1")
        until(lambda: jobs.get("t2").status is Status.SUCCEEDED)
        assert jobs.get("m2").status is Status.RUNNING
        assert jobs.get("m3").status is Status.QUEUED  # one merge at a time
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
    assert jobs.get("m2").status is Status.QUEUED


def test_the_worker_outlives_trouble_with_the_database(
    tmp_path: Path, engine: sa.Engine, jobs: Jobs, leases: Leases, caplog: pytest.LogCaptureFixture
) -> None:
    submit_stub(tmp_path, jobs, "j1", steps=3)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO away")
    with pytest.raises(sa.exc.OperationalError):
        leases.claim("w")

    with working(tmp_path, jobs, leases):
        until(lambda: caplog.messages.count("the worker failed; it tries again") > 2)  # the first is the sweep's
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO jobs")
        until(lambda: jobs.get("j1").status.has_ended)
    check_published_once(jobs, engine, "j1", 3)


def test_a_dead_workers_job_is_claimed_again_within_fifteen_seconds() -> None:
    """With the times that are used: its lease, a look for jobs, and a worker's start, which may run meanwhile."""
    timing = Timing()
    assert timing.lease + timing.poll <= 11.0
    assert timing.heartbeat * 3 < timing.lease  # two may be missed
