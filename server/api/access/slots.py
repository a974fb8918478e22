"""How much may happen at once, and how many may wait for it: whoever comes beyond is told to come again (429)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread

from server.errors import QueueFull

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_RETRY_SECONDS = 5.0


class Slots:
    """Threads for one kind of work. `what` names it in the plural."""

    def __init__(self, what: str, num_threads: int, max_waiting: int) -> None:
        self._what = what
        self._limiter = CapacityLimiter(num_threads)
        self._max_waiting = max_waiting

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """The work's result, once there was a thread for it. Raises QueueFull."""
        if self._limiter.statistics().tasks_waiting >= self._max_waiting:
            raise QueueFull(f"too many {self._what} wait", _RETRY_SECONDS)
        return await to_thread.run_sync(work, *args, limiter=self._limiter)


class Places:
    """Room for so many at once, without a queue."""

    def __init__(self, what: str, num_places: int) -> None:
        self._what = what
        self._num_free = num_places

    @contextmanager
    def taken(self) -> Iterator[None]:
        """One of them, within the context. Raises QueueFull."""
        if not self._num_free:
            raise QueueFull(f"too many {self._what} at once", _RETRY_SECONDS)
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
