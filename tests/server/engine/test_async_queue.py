"""Who is taken behind those that wait, and who is refused, over the tiny base."""

from dataclasses import replace

import pytest

from server.engine.async_engine import OutputStream
from server.engine.scheduler import SchedulerLimits
from server.errors import Draining, QueueFull
from server.model.base.weights import BaseModel
from tests.server.engine.async_bench import LONG, Bench, collect, on_loop, request


def test_the_queue_is_bounded(tiny_base: BaseModel) -> None:
    async def main() -> None:
        async with Bench(tiny_base, limits=SchedulerLimits(max_num_seqs=2), max_queue=3) as engine:
            streams = [engine.submit(replace(request(str(i)), sampling=LONG)) for i in range(3)]
            streams.append(engine.submit(request("3", n=2)))
            assert engine.num_in_flight == 5
            with pytest.raises(QueueFull) as caught:
                engine.submit(request("4"))
            assert caught.value.retry_after > 0
            await streams[0].aclose()
            streams.append(engine.submit(request("5")))
            with pytest.raises(QueueFull):
                engine.submit(request("6"))
            for stream in streams:
                await stream.aclose()
            assert engine.num_in_flight == 0
            large = await collect(engine.submit(request("7", n=8)))
            assert len(large) == 8, "more than all places: taken when nothing else is in flight"

    on_loop(main())


def test_what_would_wait_too_long_is_refused(tiny_base: BaseModel) -> None:
    """Two places, given up in the 20 seconds that both were taken: the next is free in 10."""
    now = 0.0
    limits = SchedulerLimits(max_num_seqs=2)

    async def main() -> None:
        nonlocal now
        async with Bench(tiny_base, limits=limits, queue_timeout=5, clock=lambda: now) as engine:
            streams = [engine.submit(request(str(i))) for i in range(3)]
            engine.check_queue(1)  # nobody knows yet
            now = 20.0
            for stream in streams:
                await collect(stream)
            streams = [engine.submit(replace(request("3"), sampling=LONG))]
            engine.check_queue(1)
            streams.append(engine.submit(replace(request("4"), sampling=LONG)))
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


def test_a_project_that_fills_the_queue_keeps_no_other_out(tiny_base: BaseModel) -> None:
    """Five in all, so two and a half each."""

    async def main() -> None:
        async with Bench(tiny_base, limits=SchedulerLimits(max_num_seqs=2), max_queue=3) as engine:

            def taken(project: str, num: int) -> list[OutputStream]:
                found = []
                for i in range(num):
                    one = replace(request(f"{project}{i}"), sampling=LONG, project=project)
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
            await anext(other[0])  # it runs, though the others' places are taken by long answers
            assert engine.num_in_flight == 8
            for stream in (*greedy, *other):
                await stream.aclose()
            assert engine.num_in_flight == 0
            assert not engine._in_flight._projects

    on_loop(main())


def test_a_project_waits_for_its_own_turn(tiny_base: BaseModel) -> None:
    """Two places, 10 seconds for each that ends: one project waits for many, another begins at once."""
    now = 0.0
    limits = SchedulerLimits(max_num_seqs=2)

    async def main() -> None:
        nonlocal now
        async with Bench(tiny_base, limits=limits, queue_timeout=25, clock=lambda: now) as engine:
            streams = [engine.submit(request(str(i))) for i in range(3)]
            now = 20.0
            for stream in streams:
                await collect(stream)
            streams = [
                engine.submit(replace(request(str(i)), sampling=LONG, project="greedy")) for i in range(3, 9)
            ]
            with pytest.raises(QueueFull, match="the queue takes up to 62 s"):
                engine.check_queue(1, "greedy")
            engine.check_queue(1, "other")
            streams += [
                engine.submit(replace(request(str(i)), sampling=LONG, project="other")) for i in range(9, 11)
            ]
            with pytest.raises(QueueFull, match="the queue takes up to 50 s"):
                engine.check_queue(1, "other")  # behind two of its own, of which the first begins at once
            for stream in streams:
                await stream.aclose()

    on_loop(main())
