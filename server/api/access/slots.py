"""How much may happen at once, and how many may wait for it: whoever comes beyond is told to come again (429).

One project may take three quarters of any of it, so that there is always something left for another.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Self, TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread

from server.errors import QueueFull

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_RETRY_SECONDS = 5.0


class Places:
    """Room for so many at once, without a queue. `what` names them in the plural."""

    def __init__(self, what: str, num_places: int, full: str = "at once") -> None:
        self._told = f"too many {what} {full}"
        self._num_places = num_places
        self._share = num_places - num_places // 4
        self._owner = ""
        self._taken: Counter[str] = Counter()  # by owner, of all views

    def of(self, owner: str) -> Self:
        """The same places, for a project."""
        view = copy(self)
        view._owner = owner
        return view

    @contextmanager
    def taken(self) -> Iterator[None]:
        """One of them, within the context. Raises QueueFull."""
        self.take()
        try:
            yield
        finally:
            self.give_back()

    def take(self) -> None:
        """One of them, to be given back. Raises QueueFull."""
        if self._taken.total() >= self._num_places or self._taken[self._owner] >= self._share:
            raise QueueFull(self._told, _RETRY_SECONDS)
        self._taken[self._owner] += 1

    def give_back(self) -> None:
        """What was taken, once."""
        self._taken[self._owner] -= 1
        if not self._taken[self._owner]:
            del self._taken[self._owner]


class Slots:
    """Threads for one kind of work. `what` names it in the plural."""

    def __init__(self, what: str, num_threads: int, max_waiting: int) -> None:
        self._limiter = CapacityLimiter(num_threads)
        self._places = Places(what, num_threads + max_waiting, "wait")

    def of(self, owner: str) -> Self:
        """The same threads, for a project."""
        view = copy(self)
        view._places = self._places.of(owner)
        return view

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """The work's result, once there was a thread for it. Raises QueueFull."""
        with self._places.taken():
            return await to_thread.run_sync(work, *args, limiter=self._limiter)
