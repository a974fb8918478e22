"""The admission of requests to the queue, over the tiny base."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from server.engine.async_engine import AsyncEngine, OutputStream
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.errors import Draining, QueueFull
from server.model.base.weights import BaseModel
from tests.server.engine.async_bench import LONG, Bench, collect, on_loop, request

TWO_PLACES = SchedulerLimits(max_num_seqs=2)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def long(name: object, project: str = "") -> GenerationRequest:
    """Return a request whose answer ends after all others."""
    return replace(request(str(name)), sampling=LONG, project=project)


async def serve_three(engine: AsyncEngine, clock: Clock) -> None:
    """Serve three requests in 20 s with both places taken, so that a place is free every 10 s."""
    streams = [engine.submit(request(str(i))) for i in range(3)]
    engine.check_queue(1)  # the rate isn't known yet
    clock.now = 20.0
    for stream in streams:
        await collect(stream)


async def close(streams: Iterable[OutputStream]) -> None:
    for stream in streams:
        await stream.aclose()


def test_the_queue_is_bounded(tiny_base: BaseModel) -> None:
    async def main() -> None:
        async with Bench(tiny_base, limits=TWO_PLACES, max_queue=3) as engine:
            streams = [engine.submit(long(i)) for i in range(3)]
            streams.append(engine.submit(request("3", n=2)))
            assert engine.num_in_flight == engine.max_in_flight == 5
            with pytest.raises(QueueFull) as caught:
                engine.submit(request("4"))
            assert caught.value.retry_after > 0
            await streams[0].aclose()
            streams.append(engine.submit(request("5")))
            with pytest.raises(QueueFull):
                engine.submit(request("6"))
            await close(streams)
            assert engine.num_in_flight == 0
            large = await collect(engine.submit(request("7", n=8)))
            assert len(large) == 8, "more than all places: taken when nothing else is in flight"

    on_loop(main())


def test_requests_that_would_wait_too_long_are_refused(tiny_base: BaseModel) -> None:
    clock = Clock()

    async def main() -> None:
        async with Bench(tiny_base, limits=TWO_PLACES, queue_timeout=5, clock=clock) as engine:
            await serve_three(engine, clock)
            streams = [engine.submit(long(3))]
            engine.check_queue(1)
            streams.append(engine.submit(long(4)))
            with pytest.raises(QueueFull, match="SMOLORA_QUEUE_TIMEOUT") as caught:
                engine.check_queue(1)
            assert caught.value.retry_after == pytest.approx(1.25 * 10 - 5)
            await streams[0].aclose()
            engine.check_queue(1)
            await streams[1].aclose()
            engine.drain()
            with pytest.raises(Draining):
                engine.check_queue(1)

    on_loop(main())


def test_a_full_queue_of_one_project_accepts_another_project(tiny_base: BaseModel) -> None:
    """Five may be in flight, so each project's share is two and a half."""

    async def main() -> None:
        async with Bench(tiny_base, limits=TWO_PLACES, max_queue=3) as engine:

            def taken(project: str, num: int) -> list[OutputStream]:
                found = []
                for i in range(num):
                    one = long(f"{project}{i}", project)
                    try:
                        engine.check_queue(1, project)
                    except QueueFull:
                        with pytest.raises(QueueFull):
                            engine.submit(one)
                    else:
                        found.append(engine.submit(one))
                return found

            greedy, other = taken("greedy", 500), taken("other", 500)
            assert (len(greedy), len(other)) == (5, 3)
            await anext(other[0])  # it runs, although long answers have the other project's places
            assert engine.num_in_flight == 8
            await close((*greedy, *other))
            assert engine.num_in_flight == 0
            assert not engine._in_flight._projects

    on_loop(main())


def test_a_project_waits_for_its_own_turn(tiny_base: BaseModel) -> None:
    """One project waits for many, another begins at once."""
    clock = Clock()

    async def main() -> None:
        async with Bench(tiny_base, limits=TWO_PLACES, queue_timeout=25, clock=clock) as engine:
            await serve_three(engine, clock)
            streams = [engine.submit(long(i, "greedy")) for i in range(3, 9)]
            with pytest.raises(QueueFull, match="the queue takes up to 62 s"):
                engine.check_queue(1, "greedy")
            engine.check_queue(1, "other")
            streams += [engine.submit(long(i, "other")) for i in range(9, 11)]
            with pytest.raises(QueueFull, match="the queue takes up to 50 s"):
                engine.check_queue(1, "other")  # behind two of its own, of which the first starts at once
            await close(streams)

    on_loop(main())
