"""An `AsyncEngine` over the tiny base, and helpers that drive it."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TypeVar

from adapters.errors import SmoloraError
from adapters.lora import LoraWeights
from server.engine.adapter_pool import Load
from server.engine.async_engine import AsyncEngine, OutputStream
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, Result, build_engine, refs
from tests.server.engine.faults import FailingRunner
from tests.server.engine.traffic import prompt

T = TypeVar("T")
LONG = replace(GREEDY, max_tokens=400)


def on_loop(coroutine: Coroutine[object, object, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 150))


class Bench:
    """An AsyncEngine over the tiny base, and the engine inside it."""

    def __init__(
        self,
        base: BaseModel,
        adapters: dict[str, LoraWeights] | Load | None = None,
        *,
        limits: SchedulerLimits | None = None,
        max_queue: int = 256,
        queue_timeout: float = math.inf,
        failing: set[int] | None = None,
        num_blocks: int = 256,
        watch_seconds: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_schedules = 0

        def build(wake: Callable[[], None]) -> Engine:
            engine = build_engine(base, adapters, wake=wake, limits=limits, num_blocks=num_blocks, max_rank=64)
            engine.runner = FailingRunner(engine.runner, failing or set())
            return engine

        self.asynchronous = AsyncEngine(
            build, max_queue=max_queue, queue_timeout=queue_timeout, watch_seconds=watch_seconds, clock=clock
        )
        self.engine = self.asynchronous._engine
        assert isinstance(self.engine.runner, FailingRunner)
        self.runner = self.engine.runner

    async def __aenter__(self) -> AsyncEngine:
        self.asynchronous.start()
        return self.asynchronous

    async def __aexit__(self, *_: object) -> None:
        await asyncio.wait_for(self.asynchronous.stop(), 60)


async def collect(stream: OutputStream) -> dict[int, Result]:
    results: dict[int, Result] = {}
    async for output in stream:
        results.setdefault(output.index, Result()).take(output)
    return results


async def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.002)


def request(
    name: str = "r", adapters: Mapping[str, float] | None = None, *, num: int = 10, n: int = 1
) -> GenerationRequest:
    return GenerationRequest(name, prompt(num), GREEDY, refs(**(adapters or {})), n)


def errors_of(results: dict[int, Result]) -> list[SmoloraError | None]:
    return [result.error for result in results.values()]


async def outcome(stream: OutputStream) -> SmoloraError | None:
    try:
        return errors_of(await collect(stream))[0]
    except SmoloraError as error:
        return error
