"""Limits on concurrent work. Requests beyond a limit get 429.

`Places` limits how many things, such as uploads, there are at once. It has no queue. One project may take at
most three quarters of the places.

`Lane` runs one kind of slow work in threads. Waiting projects take turns, and a project's own work is done in
order. The last free thread is reserved for a project that has no thread, so one project never uses all threads.
Work that has waited for the lane's `timeout` is refused. If a client leaves while its work waits, the work is
dropped. Work that has begun can't be interrupted, so its size must be limited in advance. The threads have a low
priority, so that the engine's steps come first.
"""

import asyncio
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.errors import QueueFull
from server.metrics.metrics import LaneMetrics
from server.system.threads import step_back

RETRY_SECONDS = 5.0


class Places:
    """A limit on concurrent things: errors call them `what`, such as "uploads", and metrics call them `name`."""

    def __init__(
        self,
        what: str,
        num_places: int,
        full: str = "at once",
        *,
        name: str = "",
        metrics: LaneMetrics | None = None,
    ) -> None:
        self._message = f"too many {what} {full}"
        self._num_places = num_places
        self._share = num_places - num_places // 4
        self._name = name
        self._taken: Counter[str] = Counter()  # by owner
        if metrics is not None:
            metrics.declare(name, is_lane=False)

    @contextmanager
    def taken(self, owner: str) -> Iterator[None]:
        """Hold a place for the project `owner` until the context ends. Raise QueueFull if no place is left."""
        self.take(owner)
        try:
            yield
        finally:
            self.give_back(owner)

    def take(self, owner: str) -> None:
        """Take a place for the project `owner` until `give_back` is called. Raise QueueFull if none is left."""
        if self._taken.total() >= self._num_places or self._taken[owner] >= self._share:
            raise QueueFull(self._message, RETRY_SECONDS, reason=self._name or None)
        self._taken[owner] += 1

    def give_back(self, owner: str) -> None:
        """Release a place of a project."""
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

receiving: ContextVar[Receive | None] = ContextVar("receiving", default=None)
"""The current request's `receive`. Once the body is read, it reports only that the client left."""


class Turns:
    """Permits for `num_threads` threads, which owners (projects) get in turn. Use it from one event loop only."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._waiting: dict[str, OrderedDict[asyncio.Future[None], None]] = {}  # by owner
        self._running: Counter[str] = Counter()
        self._last_turn: dict[str, int] = {}
        self._num_turns = 0

    @property
    def num_waiting(self) -> int:
        """Number of turns that wait for a thread."""
        return sum(map(len, self._waiting.values()))

    def join(self, owner: str) -> asyncio.Future[None]:
        """Queue for a thread. Return a turn: a future that is done once the owner has a thread.

        Call `leave` with the turn once the thread isn't needed any more.
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, OrderedDict())[turn] = None
        self._grant()
        return turn

    def leave(self, owner: str, turn: asyncio.Future[None]) -> None:
        """Give the turn's thread back, or leave the queue if the turn still waits."""
        if turn.done():
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
        else:
            self._remove(owner, turn)
        self._grant()
        if not (self._waiting or self._running):
            self._last_turn.clear()

    def _grant(self) -> None:
        while (owner := self._next()) is not None:
            turn = next(iter(self._waiting[owner]))
            self._remove(owner, turn)
            self._running[owner] += 1
            self._num_turns += 1
            self._last_turn[owner] = self._num_turns
            turn.set_result(None)

    def _next(self) -> str | None:
        """Return the owner whose turn is next, or None if no waiting owner may start.

        The owner with the fewest threads is next. Among equals, it is the owner whose last turn was longest ago.
        """
        num_idle = self.num_threads - self._running.total()
        candidates = (owner for owner in self._waiting if num_idle > (1 if self._running[owner] else 0))
        return min(
            candidates, key=lambda owner: (self._running[owner], self._last_turn.get(owner, 0)), default=None
        )

    def _remove(self, owner: str, turn: asyncio.Future[None]) -> None:
        del self._waiting[owner][turn]
        if not self._waiting[owner]:
            del self._waiting[owner]


class Lane:
    """Threads for one kind of slow work: errors call it `what`, such as "imports", and metrics call it `name`."""

    def __init__(
        self,
        name: str,
        what: str,
        threads: Turns,
        max_waiting: int,
        *,
        timeout: float = math.inf,
        metrics: LaneMetrics | None = None,
        steps_back: bool = True,
    ) -> None:
        """Lanes may share `threads`.

        If `steps_back`, this lane's threads, and the threads that they start, have a low priority.
        """
        self._name = name
        self._what = what
        self._turns = threads
        self._places = Places(what, threads.num_threads + max_waiting, "wait", name=name, metrics=metrics)
        self._timeout = timeout
        self._metrics = metrics
        self._steps_back = steps_back
        if metrics is not None:
            metrics.declare(name, is_lane=True)

    @property
    def num_waiting(self) -> int:
        """Number of calls of `run` that wait for a thread."""
        return self._turns.num_waiting

    async def run(self, owner: str, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a project's work in a thread as soon as one is free, and return its result.

        Work that has begun keeps its thread until its end, even if the caller is cancelled. Raise QueueFull if
        too much work waits or this work has waited too long, and ClientDisconnect if the client left meanwhile.
        """
        with self._places.taken(owner):
            turn = self._turns.join(owner)
            try:
                if not turn.done():
                    await self._wait(turn)
                elif self._metrics is not None:
                    self._metrics.waited(self._name, 0.0)
            except BaseException:
                self._turns.leave(owner, turn)
                raise
            working = asyncio.wrap_future(self._begin(partial(copy_context().run, work, *args)))
            working.add_done_callback(lambda _: self._turns.leave(owner, turn))
            return await asyncio.shield(working)

    async def _wait(self, turn: asyncio.Future[None]) -> None:
        """Wait for the turn. Raise QueueFull after the timeout, or ClientDisconnect if the client leaves."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        receive = receiving.get()
        leaving = None if receive is None else asyncio.ensure_future(client_left(receive))
        watched: set[asyncio.Future[Any]] = {turn} if leaving is None else {turn, leaving}
        timeout = None if math.isinf(self._timeout) else self._timeout
        try:
            await asyncio.wait(watched, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if leaving is not None:
                leaving.cancel()
            if self._metrics is not None:
                self._metrics.waited(self._name, loop.time() - began)
        if turn.done():
            return
        if leaving is not None and leaving.done():
            raise ClientDisconnect
        raise QueueFull(
            f"too many {self._what} wait: this one has waited {self._timeout:g} s (SMOLORA_QUEUE_TIMEOUT)",
            RETRY_SECONDS,
            reason=self._name,
        )

    def _begin(self, work: Callable[[], T]) -> Future[T]:
        """Start the work in a thread. The process doesn't wait for the thread when it exits."""
        result: Future[T] = Future()

        def run() -> None:
            if self._steps_back:
                step_back()
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name=f"lane-{self._name}", daemon=True).start()
        return result


async def client_left(receive: Receive) -> None:
    """Wait until the client has left. The caller must have read the request's body."""
    while (await receive())["type"] != "http.disconnect":
        pass
