"""What routers know of the replicas: their last reports, and what each router sent itself since."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.replicas import Host
from server.cluster.rank import GOLDEN, Replica, number

K = TypeVar("K")
DEAD = 1 << 30  # the queue of a replica that is down: nobody goes there


@dataclass(eq=False)
class Reports:
    """The same for all routers, and as old as the last call of `update`."""

    ids: list[str]
    numbers: NDArray[np.uint64]  # of the ids, as rank hashes them
    queues: NDArray[np.int64]
    num_resident: NDArray[np.int64]
    resident: list[frozenset[str]]
    cached: list[frozenset[int]]
    holders: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    text_holders: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def of(cls, count: int) -> "Reports":
        ids = [f"replica-{index}" for index in range(count)]
        numbers = np.array([number(name) for name in ids], np.uint64)
        empty = np.zeros(count, np.int64)
        return cls(ids, numbers, empty, empty.copy(), [frozenset()] * count, [frozenset()] * count)

    def order(self, digest: str) -> NDArray[np.uint64]:
        """`rank.mixed` of all replicas: the highest is the adapter's home."""
        return (self.numbers ^ np.uint64(number(digest))) * np.uint64(GOLDEN)

    def update(self, hosts: Sequence[Host], *, contents: bool) -> None:
        """`contents`: what is resident and cached, too, which not every policy asks for."""
        self.queues = np.array([host.queue if host.up else DEAD for host in hosts], np.int64)
        for host in hosts if contents else ():
            if host.changed:
                self.resident[host.index] = _moved(
                    self.holders, self.resident[host.index], host.resident, host.index
                )
                self.cached[host.index] = _moved(
                    self.text_holders, self.cached[host.index], host.cached, host.index
                )
                self.num_resident[host.index] = len(host.resident)
                host.changed = False


def _moved(index: dict[K, set[int]], old: frozenset[K], now: Collection[K], host: int) -> frozenset[K]:
    new = frozenset(now)
    for key in old - new:
        index[key].discard(host)
    for key in new - old:
        index[key].add(host)
    return new


@dataclass(eq=False)
class Knowledge:
    """One router's."""

    reports: Reports
    queues: NDArray[np.int64]  # of the reports, and own requests since

    @classmethod
    def of(cls, reports: Reports) -> "Knowledge":
        return cls(reports, reports.queues.copy())

    def refresh(self) -> None:
        self.queues = self.reports.queues.copy()

    @property
    def alive(self) -> NDArray[np.int64]:
        """Indices."""
        return np.flatnonzero(self.queues < DEAD)

    def total(self) -> tuple[int, int]:
        """Requests, and the replicas that have them."""
        alive = self.queues < DEAD
        return int(self.queues.sum(where=alive)), int(alive.sum())

    def holders(self, digest: str) -> NDArray[np.int64]:
        """Indices of the replicas that had it."""
        found = self.reports.holders.get(digest, ())
        return np.fromiter(found, np.int64, len(found))

    def replicas(self, indices: Iterable[int]) -> list[Replica]:
        known = self.reports
        return [
            Replica(known.ids[i], known.resident[i], int(self.queues[i]), known.cached[i])
            for i in indices
            if self.queues[i] < DEAD
        ]
