"""Calls on a loop by another thread: all of them, in order, and at no cost to that thread."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from server.engine.watching.loop_calls import LoopCalls
from tests.server.engine.async_bench import eventually, on_loop


@contextmanager
def no_forced_switch() -> Iterator[None]:
    """Meanwhile a thread has the GIL until it lets go of it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_the_loop_waits_until_the_caller_lets_it() -> None:
    """A caller that goes on in Python isn't held up by what it has called for."""

    async def main() -> bool:
        calls = LoopCalls(asyncio.get_running_loop())
        was_called = threading.Event()
        seen: list[bool] = []

        def call() -> None:
            for _ in range(20):
                calls.call(was_called.set)
                end = time.perf_counter() + 0.005
                while time.perf_counter() < end:
                    pass
                seen.append(was_called.is_set())
                assert was_called.wait(20)
                was_called.clear()

        with no_forced_switch():
            await asyncio.to_thread(call)
        calls.close()
        assert len(seen) == 20
        return any(seen)

    assert not on_loop(main())


def test_more_calls_than_a_pipe_holds() -> None:
    """In order, though the loop is busy all the while."""
    num = 100_000
    found: list[int] = []

    async def main() -> None:
        calls = LoopCalls(asyncio.get_running_loop())

        def call() -> None:
            for i in range(num):
                calls.call(partial(found.append, i))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()  # on the loop
        assert not found
        await eventually(lambda: len(found) == num)
        calls.close()

    on_loop(main())
    assert found == list(range(num))


def test_one_that_fails_is_told_and_the_others_are_called() -> None:
    found: list[str] = []
    told: list[dict[str, Any]] = []

    def fail() -> None:
        raise ValueError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        calls = LoopCalls(loop)
        calls.call(partial(found.append, "a"))
        calls.call(fail)
        calls.call(partial(found.append, "b"))
        await eventually(lambda: len(found) == 2)
        calls.close()

    on_loop(main())
    assert found == ["a", "b"]
    assert [type(context["exception"]) for context in told] == [ValueError]


def test_nothing_is_called_after_the_end() -> None:
    found: list[int] = []

    async def main() -> None:
        calls = LoopCalls(asyncio.get_running_loop())
        calls.call(partial(found.append, 1))
        calls.close()
        await asyncio.sleep(0.05)

    on_loop(main())
    assert not found
