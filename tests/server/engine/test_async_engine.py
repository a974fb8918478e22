"""The engine's thread behind an event loop, over the tiny base: limits, aborts, drain and death."""

import asyncio
import random
import time
from dataclasses import replace

import pytest

from adapters.errors import InvalidInput
from server.engine.async_engine import AsyncEngine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.errors import Draining, NotReady
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine, check_idle, run
from tests.server.engine.async_bench import LONG, Bench, collect, eventually, on_loop, request
from tests.server.engine.traffic import assert_same, library, requests_of_all_kinds


def test_outputs_arrive_in_the_engines_order(tiny_base: BaseModel) -> None:
    adapters, requests = library(tiny_base), requests_of_all_kinds(tiny_base, 16)
    expected = run(build_engine(tiny_base, adapters), requests)
    bench = Bench(tiny_base, adapters, num_blocks=16, limits=SchedulerLimits(chunk_size=8))

    async def main() -> None:
        async with bench as engine:
            found = await asyncio.gather(*(collect(engine.submit(one)) for one in requests))
            for one, results in zip(requests, found, strict=True):
                assert sorted(results) == list(range(one.n))
                for index, result in results.items():
                    assert_same(result, expected[one.request_id, index])
            assert engine.num_in_flight == 0
            await eventually(lambda: engine.stats.num_running == 0 and engine.stats.kv_blocks_used == 0)
            assert engine.stats.output_tokens == sum(len(result.token_ids) for result in expected.values())

    on_loop(main())
    check_idle(bench.engine)


def test_not_ready_before_the_start(tiny_base: BaseModel) -> None:
    engine = Bench(tiny_base).asynchronous
    assert not engine.ready
    assert not engine.dead
    with pytest.raises(NotReady):
        engine.submit(request())


def test_an_invalid_request_takes_no_place_in_the_queue(tiny_base: BaseModel) -> None:
    async def main() -> None:
        async with Bench(tiny_base) as engine:
            with pytest.raises(InvalidInput):
                engine.submit(request(num=600))
            assert engine.num_in_flight == 0

    on_loop(main())


def test_an_abort_midway_frees_its_blocks(tiny_base: BaseModel) -> None:
    bench = Bench(tiny_base, library(tiny_base, 2))

    async def main() -> None:
        async with bench as engine:
            stream = engine.submit(replace(request("a", {"00": 1.0}, n=3), sampling=LONG))
            other = asyncio.create_task(collect(engine.submit(replace(request("b"), sampling=LONG))))
            for _ in range(5):
                await anext(stream)
            await stream.aclose()
            await stream.aclose()
            assert engine.num_in_flight == 1
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await eventually(lambda: engine.stats.num_running == 1)
            assert not other.done(), "it ended before the abort could be seen"
            assert len((await other)[0].token_ids) == 400
            await eventually(lambda: engine.stats.kv_blocks_used == 0)

    on_loop(main())
    check_idle(bench.engine)


def test_a_waiting_request_can_be_aborted(tiny_base: BaseModel) -> None:
    bench = Bench(tiny_base, limits=SchedulerLimits(max_num_seqs=1))

    async def main() -> None:
        async with bench as engine:
            running = engine.submit(replace(request("a"), sampling=LONG))
            waiting = engine.submit(request("b"))
            await anext(running)
            await waiting.aclose()
            await eventually(lambda: engine.stats.num_waiting == 0)
            assert engine.stats.num_running == 1
            await running.aclose()
            await eventually(lambda: engine.stats.num_running == 0)

    on_loop(main())
    check_idle(bench.engine)


def test_fifty_clients_disconnect_at_random_times(tiny_base: BaseModel) -> None:
    adapters = library(tiny_base)
    bench = Bench(tiny_base, adapters, num_blocks=24, limits=SchedulerLimits(max_num_seqs=6, chunk_size=16))
    rng = random.Random(0)

    async def client(engine: AsyncEngine, one: GenerationRequest) -> None:
        stream = engine.submit(one)
        patience = rng.randint(0, 8)
        try:
            if rng.random() < 0.5:
                async with asyncio.timeout(rng.random() * 0.05):
                    await collect(stream)
            else:
                async for _ in stream:
                    patience -= 1
                    if patience < 0:
                        break
        except TimeoutError:
            pass
        finally:
            await stream.aclose()

    async def main() -> None:
        async with bench as engine:
            requests = [replace(r, n=rng.randint(1, 3)) for r in requests_of_all_kinds(tiny_base, 50)[:-1]]
            requests = [r for r in requests if not any(int(ref.digest) > 15 for ref in r.adapters)]
            await asyncio.gather(*(client(engine, one) for one in requests))
            assert engine.num_in_flight == 0
            await eventually(lambda: engine.stats.num_running + engine.stats.num_waiting == 0)
            assert engine.stats.kv_blocks_used == 0
            normal = (await collect(engine.submit(request("normal", {"03": 1.0}))))[0]
            assert_same(
                normal, run(build_engine(tiny_base, adapters), [request("normal", {"03": 1.0})])["normal", 0]
            )

    on_loop(main())
    check_idle(bench.engine)


def test_drain_refuses_new_requests_and_finishes_the_others(tiny_base: BaseModel) -> None:
    async def main() -> None:
        async with Bench(tiny_base, limits=SchedulerLimits(max_num_seqs=1)) as engine:
            tasks = [asyncio.create_task(collect(engine.submit(request(str(i))))) for i in range(3)]
            await asyncio.sleep(0)
            engine.drain()
            assert not engine.ready
            assert not engine.dead
            with pytest.raises(Draining):
                engine.submit(request("late"))
            for results in await asyncio.gather(*tasks):
                assert results[0].finish_reason == "length"

    on_loop(main())


def test_stop_fails_running_requests_with_a_reason(tiny_base: BaseModel) -> None:
    async def main() -> None:
        bench = Bench(tiny_base)
        async with bench as engine:
            streams = [engine.submit(replace(request(str(i)), sampling=LONG)) for i in range(2)]
            await anext(streams[0])
        for stream in streams:
            with pytest.raises(Draining):
                async for _ in stream:
                    pass
        assert not engine.ready
        with pytest.raises(Draining):
            engine.submit(request("late"))
        await engine.stop()

    on_loop(main())


def test_stop_without_a_start(tiny_base: BaseModel) -> None:
    on_loop(Bench(tiny_base).asynchronous.stop())


def test_the_loop_may_end_first(tiny_base: BaseModel) -> None:
    """When a process exits, the thread runs on for a moment without a loop."""
    bench = Bench(tiny_base)

    async def main() -> None:
        bench.asynchronous.start()
        bench.asynchronous.submit(replace(request("a"), sampling=LONG))

    on_loop(main())
    deadline = time.monotonic() + 60
    while bench.engine.has_work or bench.engine.num_steps < 400:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    on_loop(bench.asynchronous.stop())
    assert not bench.asynchronous.dead
