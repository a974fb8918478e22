"""Bounds on how much happens at once: requests beyond a bound get 429.

One project may take three quarters of any of it, so that there is always something left for another.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Self

from server.errors import QueueFull
from server.metrics.lanes import LaneMetrics

RETRY_SECONDS = 5.0


class Places:
    """Room for a number of things at once, without a queue. `what` names them in the plural, `name` in metrics."""

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
        self._metrics = metrics
        self._owner = ""
        self._taken: Counter[str] = Counter()  # by owner, of all views
        if metrics is not None:
            metrics.declare(name, is_lane=False)

    def of(self, owner: str) -> Self:
        """Return a view of the same places for a project."""
        view = copy(self)
        view._owner = owner
        return view

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold a place within the context. Raises QueueFull."""
        self.take()
        try:
            yield
        finally:
            self.give_back()

    def take(self) -> None:
        """Take a place, to be given back. Raises QueueFull."""
        if self._taken.total() >= self._num_places or self._taken[self._owner] >= self._share:
            if self._metrics is not None:
                self._metrics.refused(self._name)
            raise QueueFull(self._message, RETRY_SECONDS)
        self._taken[self._owner] += 1

    def give_back(self) -> None:
        """Release a place that was taken."""
        self._taken[self._owner] -= 1
        if not self._taken[self._owner]:
            del self._taken[self._owner]
