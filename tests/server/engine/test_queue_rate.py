"""The estimated wait for a place, against queues that are simulated event by event."""

import heapq
import random

import pytest

from server.engine.admission import QueueRate


def played(rate: QueueRate, seconds: list[float], places: int) -> float:
    """Run sequences that all arrive at 0; return the time at which the last one got a place."""
    running: list[float] = []
    num_left, now = len(seconds), 0.0
    rate.observe(0.0, num_left)
    for length in seconds:
        if len(running) == places:
            now = heapq.heappop(running)
            num_left -= 1
            rate.observe(now, num_left, 1)
        heapq.heappush(running, now + length)
    return now


def test_the_wait_is_zero_if_there_is_room() -> None:
    rate = QueueRate(4)
    assert rate.wait(0.0, 0) == 0
    played(rate, [1.0] * 40, 4)
    assert rate.wait(10.0, 0) == 0
    assert rate.wait(10.0, 1) > 0


def test_the_wait_is_unknown_before_a_whole_batch_has_ended() -> None:
    rate = QueueRate(4)
    rate.observe(0.0, 100)
    rate.observe(1.0, 97, 3)
    assert rate.wait(1.0, 94) == 0
    rate.observe(1.0, 96, 1)
    assert rate.wait(1.0, 93) == pytest.approx(93 / 4)


def test_the_estimate_matches_the_wait() -> None:
    draw = random.Random(1)
    lengths = [draw.uniform(0.5, 1.5) for _ in range(400)]
    rate = QueueRate(8)
    measured = played(rate, lengths[:200], 8)
    expected = rate.wait(measured, 93)
    true = played(QueueRate(8), lengths[200:300], 8)
    assert expected == pytest.approx(true, rel=0.2)


def test_simultaneous_ends_are_counted_once() -> None:
    """The sequences of a batch end together, so two batches' ends are one batch's time apart."""
    rate = QueueRate(4)
    rate.observe(0.0, 100)
    for number in range(1, 6):
        rate.observe(number * 5.0, 100 - 4 * number, 4)
    assert rate.wait(25.0, 77) == pytest.approx(77 / 4 * 5.0)


def test_idle_time_does_not_affect_the_rate() -> None:
    rate = QueueRate(2)
    now = 0.0
    for _ in range(10):
        rate.observe(now, 2)
        rate.observe(now + 1, 1, 1)
        rate.observe(now + 1.5, 0, 1)
        now += 1000
    assert rate.wait(now, 1) == pytest.approx(1.0)


def test_a_slowdown_raises_the_estimate_before_anything_ends() -> None:
    rate = QueueRate(2)
    now = played(rate, [1.0] * 20, 2)
    rate.observe(now, 10)
    assert rate.wait(now, 9) == pytest.approx(4.5, rel=0.2)
    assert rate.wait(now + 60, 9) > 60
    for _ in range(10):
        now += 0.1
        rate.observe(now, 10, 1)
    assert rate.wait(now, 9) == pytest.approx(0.9, rel=0.2), "only the last two batches count"
