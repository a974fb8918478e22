"""A router's view of the replicas: their last reports, and its own requests since then."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.replicas import Host
from server.cluster.rank import GOLDEN, Replica, number

K = TypeVar("K")
DEAD = 1 << 30  # queue length of a replica known to be down: never chosen


@dataclass(eq=False)
class Reports:
    """The replicas' last reports, the same for all routers and as old as the last call of `update`."""

    ids: list[str]
    numbers: NDArray[np.uint64]  # replica ids, as numbers for the rank hash
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
        """Return `rank.mixed` of all replicas: the highest is the adapter's home."""
        return (self.numbers ^ np.uint64(number(digest))) * np.uint64(GOLDEN)

    def update(self, hosts: Sequence[Host], *, contents: bool) -> None:
        """Take over the replicas' state; with `contents` also their resident adapters and cached prefixes."""
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
    """The view of one router."""

    reports: Reports
    queues: NDArray[np.int64]  # reported, plus own requests since the report

    @classmethod
    def of(cls, reports: Reports) -> "Knowledge":
        return cls(reports, reports.queues.copy())

    def refresh(self) -> None:
        self.queues = self.reports.queues.copy()

    @property
    def alive(self) -> NDArray[np.int64]:
        """Return the indices of the replicas that aren't known to be down."""
        return np.flatnonzero(self.queues < DEAD)

    def total(self) -> tuple[int, int]:
        """Return the number of own requests, and of the replicas that got them."""
        alive = self.queues < DEAD
        return int(self.queues.sum(where=alive)), int(alive.sum())

    def holders(self, digest: str) -> NDArray[np.int64]:
        """Return the indices of the replicas that reported it as resident."""
        found = self.reports.holders.get(digest, ())
        return np.fromiter(found, np.int64, len(found))

    def replicas(self, indices: Iterable[int]) -> list[Replica]:
        known = self.reports
        return [
            Replica(known.ids[i], known.resident[i], int(self.queues[i]), known.cached[i])
            for i in indices
            if self.queues[i] < DEAD
        ]
