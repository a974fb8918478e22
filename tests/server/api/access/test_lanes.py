"""Threads that projects share in turns."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server.api.lanes import Lane, Turns, receiving
from server.errors import QueueFull
from server.metrics.metrics import LaneMetrics
from server.system.threads import NICE
from tests.server.api.fakes import until

pytestmark = pytest.mark.anyio


class Work:
    """Work items that end one by one when allowed; `begun` lists them in the order of their starts."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._allowed = threading.Semaphore(0)

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self._allowed.acquire(timeout=60)
        return name

    def end(self, number: int = 1) -> None:
        self._allowed.release(number)


@asynccontextmanager
async def working(work: Work) -> AsyncIterator[asyncio.TaskGroup]:
    """Let all work end with the context."""
    try:
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            yield tasks
            work.end(1000)
    finally:
        work.end(1000)


async def test_a_work_beyond_the_places_is_refused_and_the_others_have_their_results() -> None:
    lane, work = Lane("things", "things", Turns(1), 2), Work()
    async with working(work) as tasks:
        runs = [tasks.create_task(lane.run("", work, name)) for name in "abc"]
        await until(lambda: lane.num_waiting == 2)
        with pytest.raises(QueueFull, match="too many things wait") as caught:
            await lane.run("", work, "d")
        assert caught.value.retry_after > 1
    assert [run.result() for run in runs] == ["a", "b", "c"]
    assert await lane.run("", work, "e") == "e"


async def test_waiting_projects_take_turns_and_each_is_first_come_first_served() -> None:
    lane, work = Lane("things", "things", Turns(1), 99), Work()
    async with working(work) as tasks:
        for name in ("a0", "a1", "a2", "a3", "b0", "b1", "c0"):
            tasks.create_task(lane.run(name[0], work, name))
        await until(lambda: lane.num_waiting == 6)
        for number in range(1, 7):
            work.end()
            await until(lambda: len(work.begun) > number)  # noqa: B023  # it is awaited at once
    assert work.begun == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


async def test_later_project_waits_only_for_running_work() -> None:
    lane, work = Lane("things", "things", Turns(1), 99), Work()
    async with working(work) as tasks:
        for number in range(12):
            tasks.create_task(lane.run("greedy", work, f"greedy{number}"))
        await until(lambda: lane.num_waiting == 11)
        for turn in range(3):  # each time also after its turn
            tasks.create_task(lane.run("modest", work, "modest"))
            await until(lambda: lane.num_waiting == 12 - turn)  # noqa: B023
            work.end()
            await until(lambda: len(work.begun) == 2 * turn + 2)  # noqa: B023
            work.end()
            await until(lambda: len(work.begun) == 2 * turn + 3)  # noqa: B023
    assert work.begun[:7] == ["greedy0", "modest", "greedy1", "modest", "greedy2", "modest", "greedy3"]


async def test_the_last_free_thread_is_kept_for_a_project_that_has_none() -> None:
    lane, work = Lane("things", "things", Turns(3), 99), Work()
    async with working(work) as tasks:
        for number in range(5):
            tasks.create_task(lane.run("greedy", work, f"greedy{number}"))
        await until(lambda: len(work.begun) == 2)
        tasks.create_task(lane.run("modest", work, "modest"))
        await until(lambda: len(work.begun) == 3)  # although nothing has ended
    assert work.begun[2] == "modest"
    assert len(work.begun) == 6


async def test_work_that_waits_too_long_is_refused_and_counted() -> None:
    registry = CollectorRegistry()
    lane, work = Lane("things", "things", Turns(1), 9, timeout=0.05, metrics=LaneMetrics(registry)), Work()
    assert registry.get_sample_value("smolora_refused_total", {"reason": "things"}) == 0
    async with working(work) as tasks:
        running = tasks.create_task(lane.run("", work, "a"))
        await until(lambda: work.begun == ["a"])
        with pytest.raises(QueueFull, match="SMOLORA_QUEUE_TIMEOUT") as caught:
            await lane.run("", work, "b")
        assert (caught.value.retry_after, caught.value.reason) == (5.0, "things")
        assert lane.num_waiting == 0
    assert running.result() == "a"  # running work continues
    assert work.begun == ["a"]
    assert registry.get_sample_value("smolora_lane_wait_seconds_count", {"lane": "things"}) == 2
    assert (registry.get_sample_value("smolora_lane_wait_seconds_sum", {"lane": "things"}) or 0) >= 0.05


async def test_work_is_dropped_when_its_client_leaves_while_it_waits() -> None:
    lane, work = Lane("things", "things", Turns(1), 9), Work()
    left = asyncio.Event()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def run_as_request() -> None:
        receiving.set(receive)
        with pytest.raises(ClientDisconnect):
            await lane.run("", work, "b")

    async with working(work) as tasks:
        tasks.create_task(lane.run("", work, "a"))
        await until(lambda: work.begun == ["a"])
        gone = tasks.create_task(run_as_request())
        await until(lambda: lane.num_waiting == 1)
        left.set()
        await gone
        assert lane.num_waiting == 0
    assert work.begun == ["a"]


async def test_a_cancelled_caller_leaves_the_queue_or_its_thread_at_the_end_of_the_work() -> None:
    lane, work = Lane("things", "things", Turns(1), 9), Work()
    async with working(work) as tasks:
        running = asyncio.ensure_future(lane.run("", work, "a"))
        waiting = asyncio.ensure_future(lane.run("", work, "b"))
        await until(lambda: lane.num_waiting == 1)
        waiting.cancel()
        running.cancel()
        await asyncio.wait({waiting, running})
        tasks.create_task(lane.run("", work, "c"))
        await until(lambda: lane.num_waiting == 1)  # "a" still has the thread
        work.end()
        await until(lambda: work.begun == ["a", "c"])


async def test_errors_of_work_reach_its_caller() -> None:
    lane = Lane("things", "things", Turns(1), 9)
    with pytest.raises(ZeroDivisionError):
        await lane.run("", divmod, 1, 0)
    assert await lane.run("", divmod, 7, 2) == (3, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own elsewhere")
async def test_work_yields_processors_to_the_threads_that_serve() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = niceness()
    assert await Lane("things", "things", Turns(1), 9).run("", niceness) == max(own, NICE)
    assert await Lane("things", "things", Turns(1), 9, steps_back=False).run("", niceness) == own
    assert niceness() == own
