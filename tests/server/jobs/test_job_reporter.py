"""Heartbeats of a job's process during one long call, for as long as the call may take."""

import time
from dataclasses import dataclass, field
from typing import cast

import pytest

from server.jobs import reporter
from server.jobs.leases import Claim, Leases
from server.jobs.pipe import WorkerLink
from server.jobs.reporter import JobReporter, Leave, beating
from server.jobs.yielding import Yielding


@dataclass
class Link:
    """A link to a worker that records each heartbeat."""

    beats: list[float] = field(default_factory=list)
    progress: list[object] = field(default_factory=list)
    should_leave: bool = False
    should_give_way: bool = False

    def beat(self, progress: object = None, metrics: object = None) -> None:
        self.beats.append(time.monotonic())
        self.progress += [] if progress is None else [progress]


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
    """For example, one of few bytes: then the worker's own timeout applies."""
    beats: list[float] = []
    with beating(lambda: beats.append(time.monotonic()), 0.0, every=0.02):
        time.sleep(0.2)
    assert beats == []


def test_errors_in_the_block_are_reported() -> None:
    with pytest.raises(OSError, match="full"), beating(lambda: None, 60.0):
        raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("num_parameters", "is_on_gpu", "is_long"),
    [(1_700_000_000, False, True), (1_000, False, False), (1_700_000_000, True, True), (10_000_000, True, False)],
)
def test_a_pass_may_take_as_long_as_its_size(num_parameters: int, is_on_gpu: bool, is_long: bool) -> None:
    """While requests run, a row of 8,192 tokens takes a large base over five minutes, and a small one an
    instant."""
    link = Link()
    reporter = JobReporter(
        cast(WorkerLink, link),
        cast(Leases, None),
        Claim("job", 1, "worker"),
        Yielding(lambda: 0, 1.0),
        num_parameters,
        is_on_gpu=is_on_gpu,
    )
    with reporter.computing(8192):
        deadline = time.monotonic() + (30 if is_long else 1.5)
        while not link.beats and time.monotonic() < deadline:
            time.sleep(0.01)
    assert bool(link.beats) == is_long


def test_a_pass_that_hangs_on_a_gpu_is_found_within_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the time of the slowest GPU: a hundredth of what a CPU may take."""
    seconds: list[float] = []
    monkeypatch.setattr(reporter, "beating", lambda _, given: seconds.append(given))
    for is_on_gpu in (False, True):
        JobReporter(
            cast(WorkerLink, Link()),
            cast(Leases, None),
            Claim("job", 1, "worker"),
            Yielding(lambda: 0, 1.0),
            1_700_000_000,
            is_on_gpu=is_on_gpu,
        ).computing(8192)
    assert seconds == pytest.approx([13926.4, 139.264])


def test_a_job_gives_way_after_its_step_rather_than_in_it() -> None:
    """Its progress is reported first, and a pause requested in the meantime isn't delayed."""
    link = Link(should_give_way=True)
    reporter = JobReporter(
        cast(WorkerLink, link),
        cast(Leases, None),
        Claim("job", 1, "worker"),
        Yielding(lambda: 0, 1.0),
        1000,
        is_on_gpu=False,
    )
    reporter.yield_or_leave()
    with pytest.raises(Leave):
        reporter.progress({"step": 7}, {})
    assert link.progress == [{"step": 7}]
    link.should_leave = True
    with pytest.raises(Leave):
        reporter.yield_or_leave()
