"""What a job's process says while one call takes long: that it lives, for as long as the call may take."""

import time

import pytest

from server.training.worker.job_reporter import beating


def test_it_beats_while_the_block_runs_and_no_longer() -> None:
    beats: list[float] = []
    with beating(lambda: beats.append(time.monotonic()), 60.0, every=0.02):
        deadline = time.monotonic() + 30
        while len(beats) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    number = len(beats)
    time.sleep(0.2)
    assert len(beats) == number


def test_it_beats_no_longer_than_it_may() -> None:
    beats: list[float] = []
    began = time.monotonic()
    with beating(lambda: beats.append(time.monotonic()), 0.3, every=0.02):
        time.sleep(1.0)
    assert beats
    assert beats[-1] - began < 0.9


def test_a_block_without_time_says_nothing() -> None:
    """As one of few bytes: then the worker's own patience is what it has."""
    beats: list[float] = []
    with beating(lambda: beats.append(time.monotonic()), 0.0, every=0.02):
        time.sleep(0.2)
    assert beats == []


def test_what_fails_in_the_block_is_told() -> None:
    with pytest.raises(OSError, match="full"), beating(lambda: None, 60.0):
        raise OSError("the disk is full")
