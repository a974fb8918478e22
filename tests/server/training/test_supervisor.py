"""Workers are kept alive, end when they should, and never outlive the process that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.config import load_worker_settings
from server.database import connect
from server.training.jobs import Jobs, Status
from server.training.supervisor import Supervisor, worker_command
from tests.server.training.job_kit import STUB, final_digest, steps_done, submit_stub, until

ROOT = Path(__file__).parents[3]

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")

SUPERVISING = """
import os, sys, time
from server.training.supervisor import Supervisor
home, *command = sys.argv[1:]
stub = ["-m", "tests.server.training.stub_worker", home, str(os.getpid()), "1.5"]
Supervisor(2, [sys.executable, *stub, *command]).start()
time.sleep(60)
"""


@contextmanager
def supervising(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with two workers, in a process group of its own, as `serve` is."""
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


def test_the_dead_are_replaced(tmp_path: Path) -> None:
    supervisor = Supervisor(2, SLEEPER)
    assert supervisor.pids == []
    supervisor.start()
    try:
        until(lambda: len(supervisor.pids) == 2)
        first, other = supervisor.pids
        assert os.getpgid(first) == os.getpgid(0)
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in supervisor.pids and len(supervisor.pids) == 2, 3.0)
        assert other in supervisor.pids
        last = supervisor.pids
    finally:
        stop(supervisor)
    for pid in last:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_dies_at_once_is_not_started_all_the_time(tmp_path: Path) -> None:
    path = tmp_path / "starts"
    supervisor = Supervisor(1, (sys.executable, "-S", "-c", f"open({str(path)!r}, 'a').write('x')"))
    supervisor.start()
    time.sleep(3.0)
    stop(supervisor)
    assert 2 <= len(path.read_text()) <= 4  # at 0, 0.5, 1.5 and 3.5 s, and what starting takes


def test_a_command_that_is_not_there_is_no_disaster() -> None:
    supervisor = Supervisor(1, ("/nowhere/python",))
    supervisor.start()
    time.sleep(0.3)
    assert supervisor.pids == []
    stop(supervisor)


@pytest.mark.parametrize("is_hurried", [False, True])
def test_what_doesnt_end_is_killed(is_hurried: bool) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    supervisor = Supervisor(1, (sys.executable, "-S", "-c", code), grace_seconds=60.0 if is_hurried else 0.3)
    supervisor.start()
    until(lambda: supervisor.pids)
    time.sleep(0.5)  # it ignores the signal by now
    start = time.monotonic()
    supervisor.ask_to_stop()
    if is_hurried:
        time.sleep(0.3)
        supervisor.hurry()
    until(lambda: not supervisor.is_running)
    assert 0.25 < time.monotonic() - start < 2.0


def test_none_are_started_where_none_are_wanted() -> None:
    supervisor = Supervisor(0, ("/nowhere/python",))
    supervisor.start()
    assert supervisor.pids == []
    stop(supervisor)
    stop(Supervisor(1, SLEEPER))  # never started


def test_killed_everything_below_ends_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """SIGKILL to the process that `serve` would be, with two jobs running; the next one ends them."""
    engine = connect(tmp_path)
    jobs = Jobs(engine)
    for job_id in ("j1", "j2"):
        submit_stub(tmp_path, jobs, job_id, name=job_id, steps=40, seconds=0.01, every=5, hold=True)
    with supervising(tmp_path) as process:
        until(lambda: all(steps_done(tmp_path, job_id) for job_id in ("j1", "j2")))
        assert len(group_of(process.pid)) == 5  # itself, two workers, two jobs
        process.kill()
        process.wait()
        start = time.monotonic()
        until(lambda: not group_of(process.pid), 2.0)
        assert time.monotonic() - start < 1.0
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
    """It ends by SIGTERM, and is gone at once when its parent is another process."""
    settings = load_worker_settings(home=tmp_path / "a home", train_share=0.5, device="cpu", native=False)
    command = worker_command(settings)
    given = [flag.removeprefix("--") for flag in command[5:]]
    assert "no-native" in given
    flags = dict(flag.split("=", 1) for flag in given if "=" in flag)
    assert flags.pop("parent") == str(os.getpid())
    named = {name.replace("-", "_"): value for name, value in flags.items()}
    assert load_worker_settings(**named, native=False) == settings
    assert "base-dir" not in flags
    log = tmp_path / "log"
    with open(log, "wb") as output:
        worker = subprocess.Popen(command, stderr=output)
    until(lambda: (tmp_path / "a home/reserve").exists())
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    mapped = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "libtorch" not in mapped  # its processes need that, not the worker
    worker.terminate()
    assert worker.wait(10) == 0
    assert log.read_text() == ""
    assert subprocess.run([*command[:-1], "--parent=1"], timeout=30, check=False).returncode == 1
