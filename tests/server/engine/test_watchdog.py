"""The watchdog reports hanging steps, and never a working one, whatever the clock shows."""

import pytest

from server.engine.async_engine import Watchdog

TICK = 0.25


class Watched:
    """A watchdog that looks every `TICK` seconds while the process runs."""

    def __init__(self, **limits: float) -> None:
        self.watchdog = Watchdog(**limits)
        self.now = 1000.0

    def run(self, step: int | None, seconds: float) -> bool:
        """Return whether the watchdog reported during these seconds of one step, or without a step."""
        reported = False
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            reported |= self.watchdog.look(step, self.now)
        return reported

    def stop(self, seconds: float) -> None:
        """Let time pass while the process is stopped."""
        self.now += seconds


def test_a_step_is_stalled_after_half_a_minute() -> None:
    watched = Watched()
    assert not watched.run(0, 30.0)
    assert watched.run(0, 1.0)


def test_a_step_may_take_twenty_times_the_longest_before_it() -> None:
    watched = Watched()
    for step, seconds in enumerate((0.5, 5.0)):
        assert not watched.run(step, seconds + TICK)
    assert watched.watchdog.limit == 30.0  # the longer one has not ended
    assert not watched.run(2, 1.0)
    assert not watched.run(3, 100.0)
    assert watched.watchdog.limit == 100.0
    assert watched.run(3, 1.0)


def test_a_step_does_not_raise_its_own_limit() -> None:
    watched = Watched(least_seconds=2.0)
    assert watched.run(0, 3.0)
    assert watched.watchdog.limit == 2.0


@pytest.mark.parametrize("step", [None, 7])
def test_idle_time_and_short_steps_do_not_count_as_stalled(step: int | None) -> None:
    watched = Watched(least_seconds=2.0)
    for number in range(100):
        assert not watched.run(None if step is None else number, 1.0)
    assert watched.watchdog.limit == (2.0 if step is None else 20 * (1.0 - TICK))


def test_time_while_the_process_was_stopped_does_not_count() -> None:
    """Stopped time doesn't count towards the step's duration, neither during nor after it."""
    watched = Watched(least_seconds=10.0)
    assert not watched.run(0, 4.0)
    watched.stop(3600.0)
    assert not watched.run(0, 4.0)
    assert not watched.run(1, 0.0)
    watched.stop(3600.0)
    assert not watched.run(1, 0.5)
    assert watched.watchdog.limit <= 20 * (4.0 + 4.0 + 1.0)
    assert not watched.run(2, 0.5)


def test_work_before_and_after_a_stop_adds_up() -> None:
    watched = Watched(least_seconds=10.0)
    assert not watched.run(0, 6.0)
    watched.stop(100.0)
    assert not watched.run(0, 2.5)
    assert watched.run(0, 2.5)
