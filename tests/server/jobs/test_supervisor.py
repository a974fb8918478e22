"""Workers are kept running, end when they should, and never outlive the process that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from server.config import WorkerSettings, load
from server.database import connect
from server.jobs.jobs import Jobs, Status
from server.jobs.pipe import EXIT_NO_BASE
from server.jobs.supervisor import MAX_DELAY, Supervisor, worker_command
from server.jobs.worker import NICENESS
from tests.server.jobs.job_kit import STUB, final_digest, steps_done, submit_stub, until

ROOT = Path(__file__).parents[3]

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")

SUPERVISING = """
import os, sys, time
from server.jobs.supervisor import Supervisor
home, *command = sys.argv[1:]
stub = ["-m", "tests.server.jobs.stub_worker", home, str(os.getpid()), "1.5"]
Supervisor(2, [sys.executable, *stub, *command]).start()
time.sleep(60)
"""


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._num_looks = 0

    def __call__(self) -> float:
        self._num_looks += 1
        return self.now

    def wait_for_looks(self) -> None:
        """Wait until the clock's user has seen the time, and acted on it."""
        seen = self._num_looks
        until(lambda: self._num_looks > seen + 2)


@contextmanager
def supervising(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process with two workers in its own process group, like `serve`."""
    command = [sys.executable, "-c", SUPERVISING, str(home), *STUB]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, process_group=0)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def group_of(pgid: int) -> set[int]:
    """All living processes of the group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == pgid and state != "Z":
            found.add(int(path.parent.name))
    return found


def stop(supervisor: Supervisor) -> None:
    supervisor.ask_to_stop()
    until(lambda: not supervisor.is_running)


def test_dead_workers_are_replaced(tmp_path: Path) -> None:
    supervisor = Supervisor(2, SLEEPER)
    assert supervisor.pids == []
    supervisor.start()
    try:
        until(lambda: len(supervisor.pids) == 2)
        first, other = supervisor.pids
        assert os.getpgid(first) == os.getpgid(0)
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in supervisor.pids and len(supervisor.pids) == 2)
        assert other in supervisor.pids
        last = supervisor.pids
    finally:
        stop(supervisor)
    for pid in last:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def ending(path: Path, code: int = 0) -> tuple[str, ...]:
    """A command that notes in a file that it was started, and ends."""
    return (sys.executable, "-S", "-c", f"open({str(path)!r}, 'a').write('x'); raise SystemExit({code})")


def was_started(path: Path, times: int) -> bool:
    return path.exists() and len(path.read_text()) >= times


def starts_at(path: Path, code: int, seconds: Sequence[float]) -> None:
    """By a clock that only the test moves, what `ending` runs is started at these times and at no other."""
    clock = Clock()
    supervisor = Supervisor(1, ending(path, code), clock=clock)
    supervisor.start()
    try:
        for number, second in enumerate(seconds):
            if number:
                clock.now = second - 0.01
                clock.wait_for_looks()
                assert len(path.read_text()) == number, f"it was started before {second} s"
            clock.now = second
            until(partial(was_started, path, number + 1))
            clock.wait_for_looks()  # it may have noted its start before the supervisor noted its number
            until(lambda: not supervisor.pids)
    finally:
        stop(supervisor)
    assert len(path.read_text()) == len(seconds)


def test_failing_worker_is_restarted_with_a_delay(tmp_path: Path) -> None:
    starts_at(tmp_path / "starts", 0, [0.0, 0.5, 1.5, 3.5, 7.5, 11.5])


def test_worker_without_a_base_restarts_much_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    starts_at(tmp_path / "starts", EXIT_NO_BASE, [0.0, 30.0, 90.0, 210.0, 450.0, 930.0, 1530.0, 2130.0])
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said[0] == "training waits: a worker can't load the base; the next try is in 30 s"
    assert [float(line.split()[-2]) for line in said[:6]] == [30, 60, 120, 240, 480, 600]


def test_missing_command_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    supervisor = Supervisor(1, ("/nowhere/python",), clock=clock)
    supervisor.start()
    clock.wait_for_looks()
    assert supervisor.pids == []
    assert caplog.messages == ["can't start a worker: No such file or directory"]
    clock.now = MAX_DELAY
    until(lambda: len(caplog.messages) == 2)
    stop(supervisor)


@pytest.mark.parametrize("is_hurried", [False, True])
def test_worker_that_does_not_end_is_killed(is_hurried: bool, tmp_path: Path) -> None:
    """Once its time is over, or at a second signal."""
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(tmp_path / 'deaf')!r}, 'w'); time.sleep(60)"
    clock = Clock()
    command = (sys.executable, "-S", "-c", f"import signal, time; {deaf}")
    supervisor = Supervisor(1, command, grace_seconds=25.0, clock=clock)
    supervisor.start()
    until((tmp_path / "deaf").exists)
    supervisor.ask_to_stop()
    clock.wait_for_looks()
    clock.now = 24.9
    clock.wait_for_looks()
    assert supervisor.is_running
    assert supervisor.pids
    if is_hurried:
        supervisor.hurry()
    else:
        clock.now = 25.1
    until(lambda: not supervisor.is_running)


def test_no_workers_are_started_if_none_are_wanted() -> None:
    supervisor = Supervisor(0, ("/nowhere/python",))
    supervisor.start()
    assert supervisor.pids == []
    stop(supervisor)
    stop(Supervisor(1, SLEEPER))  # never started


def test_killed_server_ends_its_workers_and_the_next_one_resumes(tmp_path: Path) -> None:
    """SIGKILL to the process group that `serve` would be, with two jobs running; the next one completes them."""
    engine = connect(tmp_path)
    jobs = Jobs(engine)
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id, name=job_id, steps=40, seconds=0.01, every=5, hold=True)
    took = 9.0
    for _ in range(5):  # others use the machine, for seconds at a time
        with supervising(tmp_path) as process:
            until(lambda: all(steps_done(tmp_path, job_id) for job_id in ("j1", "j2")))
            until(lambda: len(group_of(process.pid)) == 5)  # itself, two workers, two jobs
            process.kill()
            process.wait()
            start = time.monotonic()
            until(lambda: not group_of(process.pid))
            took = time.monotonic() - start
        if took < 1.0:
            break
    assert took < 1.0
    with supervising(tmp_path):
        for job_id in ("j1", "j2"):
            (tmp_path / "jobs" / job_id / "go").touch()
        until(lambda: all(job.status.has_ended for job in jobs.list()))
    for job in jobs.list():
        assert job.status is Status.SUCCEEDED
        assert job.attempt >= 2
        assert job.adapter is not None
        assert job.adapter["digest"] == final_digest(40)
    engine.dispose()


def test_the_command_is_a_worker_with_the_same_settings(tmp_path: Path) -> None:
    """It ends by SIGTERM, and at once if its parent is another process."""
    settings = load(WorkerSettings, home=tmp_path / "a home", train_share=0.5, device="cpu", native=False)
    command = worker_command(settings)
    *_, document, parent = command
    assert (WorkerSettings.model_validate_json(document), int(parent)) == (settings, os.getpid())
    log = tmp_path / "log"
    with open(log, "wb") as output:
        worker = subprocess.Popen(command, stderr=output)
    try:
        until(lambda: (tmp_path / "a home/reserve").exists())
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, 19)
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == niceness
        mapped = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "libtorch" not in mapped  # its child processes need that, not the worker
        worker.terminate()
        assert worker.wait(120) == 0  # on a busy machine
    finally:
        worker.kill()
        worker.wait()
    assert log.read_text() == ""
    assert subprocess.run([*command[:-1], "1"], timeout=120, check=False).returncode == 1
