"""The engine's thread with failing steps, slow or broken adapters, and hanging steps."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from adapters.errors import CorruptAdapter, SmoloraError
from adapters.lora import LoraWeights
from server.engine.runner import Drawn
from server.engine.scheduler import Scheduler, SchedulerLimits, Step
from server.engine.sequence import Chunk, Sequence
from server.errors import Draining, EngineDead, GenerationFailed, NotReady, QueueFull
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine, check_idle, random_adapter, run
from tests.server.engine.async_bench import LONG, Bench, collect, errors_of, eventually, on_loop, outcome, request
from tests.server.engine.faults import BrokenScheduler, FailingRunner, SlowLoad
from tests.server.engine.traffic import assert_same


def test_a_failing_step_is_survived(tiny_base: BaseModel) -> None:
    async def main() -> None:
        async with Bench(tiny_base, failing={2, 3}) as engine:
            both = await asyncio.gather(*(collect(engine.submit(request(str(i)))) for i in range(2)))
            assert any(isinstance(error, GenerationFailed) for results in both for error in errors_of(results))
            await collect(engine.submit(request("between")))
            assert engine.ready
            assert not engine.dead
            assert (await collect(engine.submit(request("fine"))))[0].finish_reason == "length"

    on_loop(main())


def test_three_failing_steps_end_all_requests(tiny_base: BaseModel) -> None:
    bench = Bench(tiny_base, failing={3, 4, 5}, limits=SchedulerLimits(max_num_seqs=2))

    async def main() -> None:
        async with bench as engine:
            found = await asyncio.gather(*(collect(engine.submit(request(str(i), n=2))) for i in range(6)))
            errors = [error for results in found for error in errors_of(results)]
            assert len(errors) == 12
            assert sum(isinstance(error, GenerationFailed) for error in errors) == 6
            assert sum(isinstance(error, EngineDead) for error in errors) == 6
            await eventually(lambda: engine.dead)
            assert not engine.ready
            assert engine.num_in_flight == 0
            assert engine.stats.kv_blocks_used == 0
            with pytest.raises(EngineDead):
                engine.submit(request("late"))

    on_loop(main())
    check_idle(bench.engine)


def test_requests_that_arrive_while_the_engine_dies_fail(tiny_base: BaseModel) -> None:
    """The requests are in the inbox when the thread ends."""
    bench = Bench(tiny_base, failing={0, 1, 2})

    async def main() -> None:
        async with bench as engine:
            tasks: list[asyncio.Task[SmoloraError | None]] = []
            while not engine.dead:
                # The engine isn't ready once its thread has ended, even if no call has noticed.
                with suppress(EngineDead, NotReady, QueueFull):
                    tasks.append(asyncio.create_task(outcome(engine.submit(request(str(len(tasks)))))))
                await asyncio.sleep(0)
            assert tasks
            for error in await asyncio.gather(*tasks):
                assert isinstance(error, GenerationFailed | EngineDead)

    on_loop(main())


def test_repeated_scheduling_failures_end_all_requests(tiny_base: BaseModel) -> None:
    async def main() -> None:
        bench = Bench(tiny_base)
        async with bench as engine:
            stream = engine.submit(replace(request("a"), sampling=LONG))
            await anext(stream)
            bench.engine.scheduler = BrokenScheduler(bench.engine)
            assert isinstance([output async for output in stream][-1].error, EngineDead)
            await eventually(lambda: engine.dead)
            assert not engine.ready

    on_loop(main())


def test_two_scheduling_failures_are_survived(tiny_base: BaseModel) -> None:
    """Nothing else wakes the thread: it retries by itself."""

    class Failing(BrokenScheduler):
        num_failures = 0

        def schedule(self) -> Step:
            self.num_failures += 1
            return super().schedule() if self.num_failures <= 2 else Scheduler.schedule(self)

    async def main() -> None:
        bench = Bench(tiny_base)
        bench.engine.scheduler = Failing(bench.engine)
        async with bench as engine:
            assert await outcome(engine.submit(request("a"))) is None
            assert engine.ready

    on_loop(main())


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_that_cannot_be_added_fails_alone(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    bench = Bench(tiny_base)
    add = bench.engine.scheduler.add

    def fail(sequence: Sequence) -> None:
        assert (sequence.request.request_id, sequence.index) != ("bad", n - 1), "a secret of the queue"
        add(sequence)

    monkeypatch.setattr(bench.engine.scheduler, "add", fail)

    async def main() -> None:
        async with bench as engine:
            stream = engine.submit(replace(request("fine"), sampling=LONG))
            error = await outcome(engine.submit(request("bad", n=n)))
            assert isinstance(error, GenerationFailed)
            assert "secret" not in str(error)
            assert await outcome(engine.submit(request("next"))) is None
            assert await outcome(stream) is None
            assert engine.num_in_flight == 0

    on_loop(main())
    check_idle(bench.engine)


def test_a_request_that_cannot_be_aborted_affects_no_other(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_base)
    abort = bench.engine.abort
    aborted: list[str] = []

    def fail(request_id: str) -> None:
        aborted.append(request_id)
        assert request_id != "bad", "a secret of the queue"
        abort(request_id)

    monkeypatch.setattr(bench.engine, "abort", fail)

    async def main() -> None:
        async with bench as engine:
            stream = engine.submit(replace(request("bad"), sampling=replace(LONG, max_tokens=40)))
            await anext(stream)
            await stream.aclose()
            await eventually(lambda: aborted == ["bad"])
            assert await outcome(engine.submit(request("next"))) is None
            await eventually(lambda: engine.stats.num_running == 0)
            assert engine.ready

    on_loop(main())
    check_idle(bench.engine)


@pytest.fixture
def slow_load(tiny_base: BaseModel) -> Iterator[SlowLoad]:
    load = SlowLoad(tiny_base)
    yield load
    load.go.set()


@asynccontextmanager
async def let_go(load: SlowLoad, seconds: float) -> AsyncIterator[None]:
    """Let the loads end after the block, or after some seconds, even if the event loop is blocked."""
    timer = threading.Timer(seconds, load.go.set)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        load.go.set()


def test_a_cold_adapter_does_not_stall_the_others(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    async def main() -> None:
        async with Bench(tiny_base, slow_load) as engine:
            cold = asyncio.create_task(collect(engine.submit(request("cold", {"00": 1.0}))))
            await eventually(lambda: slow_load.num_started == 1)
            for i in range(3):
                await collect(engine.submit(request(f"base{i}")))
            assert not cold.done()
            slow_load.go.set()
            expected = run(build_engine(tiny_base, slow_load.adapters), [request("cold", {"00": 1.0})])
            assert_same((await cold)[0], expected["cold", 0])
            assert engine.stats.resident == {"00"}

    on_loop(main())


def test_slow_adapter_reads_delay_no_other_adapters(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    """An example is an adapter in an object store that doesn't answer."""
    slow_load.quick = frozenset({"03"})

    async def main() -> None:
        async with Bench(tiny_base, slow_load) as engine, let_go(slow_load, 30):
            slow = [
                asyncio.create_task(collect(engine.submit(request(name, {name: 1.0}))))
                for name in ("00", "01", "02")
            ]
            await eventually(lambda: slow_load.num_started >= 2)
            quick = await collect(engine.submit(request("quick", {"03": 1.0})))
            assert quick[0].finish_reason == "length"
            assert not slow_load.go.is_set(), "it had to wait for them"
            assert not any(task.done() for task in slow)
            slow_load.go.set()
            for results in await asyncio.gather(*slow):
                assert results[0].finish_reason == "length"

    on_loop(main())


def test_the_process_can_end_during_a_slow_adapter_read(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    """The process waits for the read, but not on the event loop, which still sends answers."""

    was_let_go: list[bool] = []

    def go() -> None:
        was_let_go.append(slow_load.go.is_set())
        slow_load.go.set()

    async def main() -> None:
        async with Bench(tiny_base, slow_load) as engine, let_go(slow_load, 30):
            stream = engine.submit(request("cold", {"00": 1.0}))
            await eventually(lambda: slow_load.num_started == 1)
            asyncio.get_running_loop().call_later(0.5, go)
            await engine.stop()
            assert was_let_go == [False], "it wasn't waited for, or the loop stood still"
            with pytest.raises(Draining):
                await asyncio.wait_for(collect(stream), 60)

    on_loop(main())


class Watched(threading.Condition):
    """An executor that knows whether a thread waits for it."""

    is_waiting = False

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waiting = True
        found = super().wait(timeout)
        self.is_waiting = False
        return found


def test_the_engine_sleeps_while_it_waits_for_an_adapter(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    bench = Bench(tiny_base, slow_load)
    news = bench.asynchronous._news = Watched()
    num_steps = 0
    schedule = bench.engine.scheduler.schedule

    class Counting(BrokenScheduler):
        def schedule(self) -> Step:
            nonlocal num_steps
            num_steps += 1
            return schedule()

    bench.engine.scheduler = Counting(bench.engine)

    async def main() -> None:
        async with bench as engine:
            cold = asyncio.create_task(collect(engine.submit(request("cold", {"00": 0.5, "01": 0.5}))))
            await eventually(lambda: slow_load.num_started == 2)
            await eventually(lambda: news.is_waiting)
            assert num_steps <= 3
            slow_load.go.set()
            await cold
            assert num_steps <= 3 + 16 + 6
            await eventually(lambda: news.is_waiting)

    on_loop(main())


def test_a_request_can_be_aborted_while_its_adapter_is_read(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    bench = Bench(tiny_base, slow_load)

    async def main() -> None:
        async with bench as engine:
            stream = engine.submit(request("a", {"00": 1.0}))
            await eventually(lambda: slow_load.num_started == 1)
            await eventually(lambda: engine.stats.num_waiting == 1)
            await stream.aclose()
            await eventually(lambda: engine.stats.num_waiting == 0)
            slow_load.go.set()
            assert (await collect(engine.submit(request("b", {"00": 1.0}))))[0].finish_reason == "length"

    on_loop(main())
    check_idle(bench.engine)


def test_a_broken_adapter_fails_its_own_requests(tiny_base: BaseModel) -> None:
    fine = random_adapter(tiny_base.config.shape, 0)
    is_broken = True

    def load(digest: str) -> LoraWeights:
        if is_broken and digest == "01":
            raise CorruptAdapter("its bytes are gone")
        return fine

    async def main() -> None:
        nonlocal is_broken
        async with Bench(tiny_base, load) as engine:
            good, bad = await asyncio.gather(
                collect(engine.submit(request("good", {"00": 1.0}))),
                collect(engine.submit(request("bad", {"00": 1.0, "01": 1.0}, n=2))),
            )
            assert good[0].finish_reason == "length"
            assert [str(error) for error in errors_of(bad)] == ["its bytes are gone"] * 2
            assert engine.ready
            is_broken = False
            assert (await collect(engine.submit(request("again", {"01": 1.0}))))[0].finish_reason == "length"

    on_loop(main())


def hang(bench: Bench, go: threading.Event) -> threading.Event:
    """Make its steps wait for `go`; return an event that is set when the first step waits."""
    hangs = threading.Event()

    class Hanging(FailingRunner):
        def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
            hangs.set()
            assert go.wait(100)
            return super().run(chunks)

    bench.engine.runner = Hanging(bench.engine.runner, set())
    return hangs


class Clock:
    """A clock that advances by half a second at each look, once started."""

    def __init__(self) -> None:
        self.now = 0.0
        self.goes = False

    def __call__(self) -> float:
        self.now += 0.5 * self.goes
        return self.now


def test_a_hanging_step_ends_all_requests(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    """All requests fail, new ones are refused, and `stop` doesn't wait for the thread."""
    clock = Clock()
    bench = Bench(tiny_base, limits=SchedulerLimits(max_num_seqs=1), watch_seconds=0.001, clock=clock)

    async def main() -> None:
        async with bench as engine:
            running = engine.submit(replace(request("running"), sampling=LONG))
            await anext(running)
            hangs = hang(bench, slow_load.go)
            waiting = engine.submit(request("waiting", n=2))
            await eventually(hangs.is_set)
            clock.goes = True
            for stream in (running, waiting):
                with pytest.raises(EngineDead):
                    async for _ in stream:
                        pass
            assert 30 < clock.now < 33  # counting the requests in flight reads it too
            assert engine.dead
            assert engine.hung
            assert not engine.ready
            assert engine.num_in_flight == 0
            with pytest.raises(EngineDead):
                engine.submit(request("late"))
        assert not slow_load.go.is_set(), "it was stopped without the thread"

    on_loop(main())
    slow_load.go.set()
    bench.asynchronous._thread.join(60)
    assert not bench.asynchronous._thread.is_alive(), "it ends when the step does"
    bench.engine.close()


def test_the_process_can_end_during_a_hanging_step(tiny_base: BaseModel, slow_load: SlowLoad) -> None:
    clock = Clock()
    bench = Bench(tiny_base, watch_seconds=0.001, clock=clock)

    async def main() -> None:
        async with bench as engine:
            hangs = hang(bench, slow_load.go)
            stream = engine.submit(request("a"))
            await eventually(hangs.is_set)
            clock.goes = True
            engine.drain()
            await engine.stop()
            assert engine.hung
            with pytest.raises(EngineDead):
                await collect(stream)

    on_loop(main())
    slow_load.go.set()
    bench.asynchronous._thread.join(60)
    bench.engine.close()


def test_a_dead_engine_thread_is_detected(tiny_base: BaseModel) -> None:
    """It dies by an exception that isn't an Exception, such as a panic in a library."""

    class Panic(BaseException):
        pass

    class Panicking(FailingRunner):
        def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
            raise Panic("a secret of the library")

    async def main() -> None:
        bench = Bench(tiny_base)
        async with bench as engine:
            bench.engine.runner = Panicking(bench.engine.runner, set())
            async with asyncio.timeout(20):  # less than a step may take
                with pytest.raises(EngineDead):
                    await collect(engine.submit(request("a")))
            await eventually(lambda: not engine.ready)
            assert engine.dead
            assert not engine.hung

    on_loop(main())
