"""The busy flag and the pauses, with a clock that only sleeping moves."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.jobs.yielding import BusyFlag, Yielding


class Clock:
    """A clock that moves when a thread sleeps or works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_other_processes_read_the_flag(tmp_path: Path) -> None:
    serving, training = BusyFlag(tmp_path), BusyFlag(tmp_path)
    assert training.read() == 0  # never set
    for number in (3, 32, 0, 70_000):
        serving.set(number)
        assert training.read() == min(number, 65_535)
    code = "import sys; from pathlib import Path; from server.jobs.yielding import BusyFlag; "
    code += "print(BusyFlag(Path(sys.argv[1])).read())"
    serving.set(7)
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=True)
    assert found.stdout == b"7\n"
    serving.close()
    training.close()


def test_flag_expires_if_not_renewed(tmp_path: Path) -> None:
    clock = Clock()
    serving, training = BusyFlag(tmp_path, clock), BusyFlag(tmp_path, clock)
    serving.set(4)
    clock.now += 1.9
    assert training.read() == 4
    clock.now += 0.2
    assert training.read() == 0
    serving.set(4)  # the same number: renewed
    assert training.read() == 4
    clock.now -= 500  # another machine's clock, or this one's after a restart
    assert training.read() == 0


def test_an_idle_server_writes_nothing_and_a_busy_one_seldom(tmp_path: Path) -> None:
    clock = Clock()
    flag = BusyFlag(tmp_path, clock)

    def is_written(number: int) -> bool:
        os.utime(tmp_path / "serving", (0, 0))
        flag.set(number)
        return (tmp_path / "serving").stat().st_mtime > 0

    assert not is_written(0)
    written = []
    for _ in range(20):
        written.append(is_written(1))
        clock.now += 0.1
    assert written.count(True) == 4
    assert is_written(2)
    assert is_written(0)
    clock.now += 100
    assert not is_written(0)


def test_a_read_takes_microseconds(tmp_path: Path) -> None:
    flag = BusyFlag(tmp_path)
    took, until = 1.0, time.monotonic() + 30
    while took >= 0.1 and time.monotonic() < until:  # others use the machine, for seconds at a time
        start = time.perf_counter()
        for _ in range(1000):
            flag.read()
        took = time.perf_counter() - start
    assert took < 0.1


def run(share: float, num_running: Callable[[float], int], step: float, seconds: float) -> tuple[float, float]:
    """Work in steps for that time; return the share of work, and the share that `pause` counted as other time."""
    clock = Clock()
    yielding = Yielding(lambda: num_running(clock.now - 1000), share, clock=clock, sleep=clock.sleep)
    worked = paused = 0.0
    while clock.now - 1000 < seconds:
        clock.now += step
        worked += step
        paused += yielding.pause()
    return worked / (clock.now - 1000), paused / (clock.now - 1000)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("step", [0.003, 0.2, 9.0])
def test_the_share_is_kept_while_requests_run(share: float, step: float) -> None:
    worked, paused = run(share, lambda now: 4, step, 1000.0)
    assert worked == pytest.approx(share, abs=0.02)
    assert worked + paused == pytest.approx(1.0)


def test_nothing_is_given_away_while_none_run() -> None:
    worked, paused = run(0.25, lambda now: 0, 0.2, 100.0)
    assert worked == pytest.approx(1.0)
    assert paused == 0.0


@pytest.mark.parametrize("got", [0.5, 0.3, 0.1])
def test_time_of_other_threads_is_not_work(got: float) -> None:
    """Requests use the cores as well, so a step gets only part of its time: the share counts what it got."""
    clock = Clock()
    work = 0.0
    yielding = Yielding(lambda: 4, 0.25, work=lambda: work, clock=clock, sleep=clock.sleep)
    for _ in range(100):
        clock.now += 0.2
        work += 0.2 * got
        yielding.pause()
    assert work / (clock.now - 1000) == pytest.approx(min(got, 0.25), abs=0.01)


def test_a_step_that_got_less_earns_a_longer_one() -> None:
    """One step in three has the cores to itself: the share is of the total time, not of each step's."""
    clock = Clock()
    work = 0.0
    yielding = Yielding(lambda: 4, 0.25, work=lambda: work, clock=clock, sleep=clock.sleep)
    paused = 0.0
    for number in range(300):
        clock.now += 0.2
        work += 0.2 if number % 3 == 0 else 0.02
        paused += yielding.pause()
    assert work / (clock.now - 1000) == pytest.approx(0.25, abs=0.01)
    assert paused / (clock.now - 1000) == pytest.approx(1 - 0.6 * 0.25 / 0.24, abs=0.01)


def test_a_very_long_step() -> None:
    """A step of minutes counts only its share of work, and at most half a minute's."""
    clock = Clock()
    work = 0.0
    yielding = Yielding(lambda: 4, 0.25, work=lambda: work, clock=clock, sleep=clock.sleep)
    clock.now += 200.0
    work += 50.0
    assert yielding.pause() == pytest.approx(0.0)
    clock.now += 200.0
    work += 200.0
    assert yielding.pause() == pytest.approx(30.0 * 3, abs=0.1)


def test_half_the_time_requests() -> None:
    """Ten seconds each, in turns: all of one half, a quarter of the other."""
    worked, _ = run(0.25, lambda now: int(now / 10) % 2, 0.2, 1000.0)
    assert worked == pytest.approx(0.5 + 0.125, abs=0.02)


def test_pause_ends_with_the_requests_or_on_demand() -> None:
    clock = Clock()
    running = 1
    yielding = Yielding(lambda: running, 0.1, clock=clock, sleep=clock.sleep)
    clock.now += 10.0
    calls = 0

    def go_on() -> bool:
        nonlocal calls
        calls += 1
        return calls < 20

    assert 0.3 < yielding.pause(go_on) < 0.5  # of 90 s
    clock.now += 10.0
    running = 0
    assert yielding.pause() == 0.0


def test_a_share_of_nothing_waits_for_the_end_of_requests() -> None:
    clock = Clock()
    yielding = Yielding(lambda: int(clock.now < 5000), 0.0, clock=clock, sleep=clock.sleep)
    assert yielding.pause() == pytest.approx(4000.0, abs=0.1)
    assert yielding.pause() == 0.0


def test_idle_server_does_not_clear_anothers_flag(tmp_path: Path) -> None:
    """For example, the engine replicas of one machine."""
    clock = Clock()
    left, right = BusyFlag(tmp_path, clock, place=1), BusyFlag(tmp_path, clock, place=63)
    training = BusyFlag(tmp_path, clock)
    left.set(2)
    right.set(3)
    assert training.read() == 5
    right.set(0)
    assert training.read() == 2
    clock.now += 2.1
    assert training.read() == 0
    for flag in (left, right, training):
        flag.close()
