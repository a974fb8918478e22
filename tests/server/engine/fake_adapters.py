"""A fake adapter pool with little room, whose loads take some steps or fail."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from adapters.errors import CorruptAdapter, InvalidInput
from server.engine.adapter_pool import AdapterHold, AdapterPool


@dataclass(eq=False)
class FakeAdapters(AdapterPool):
    """Room for `capacity` adapters at once; a load takes a random number of steps, and some fail."""

    capacity: int
    rng: random.Random
    max_load_steps: int = 3
    failing: frozenset[str] = frozenset()
    holds: Counter[str] = field(default_factory=Counter)
    loaded: list[str] = field(default_factory=list)  # least recently loaded first
    loading: dict[str, int] = field(default_factory=dict)  # steps to go
    num_freed: int = 0
    clock: Callable[[], float] = lambda: 0.0

    def share(self, holds: Iterable[AdapterHold]) -> float:
        return len({ref.digest for hold in holds for ref in hold.refs}) / self.capacity

    def fits(self, hold: AdapterHold, without: Collection[AdapterHold]) -> bool:
        needed = +(self.holds - Counter(ref.digest for other in without for ref in other.refs))
        return len(needed.keys() | {ref.digest for ref in hold.refs}) <= self.capacity

    def release(self, hold: AdapterHold) -> None:
        if hold.is_held:
            self.num_freed += bool(hold.refs)
            self.holds.subtract(ref.digest for ref in hold.refs)
            hold.is_held = False

    def tick(self) -> None:
        for digest in list(self.loading):
            self.loading[digest] -= 1
            if self.loading[digest] <= 0:
                del self.loading[digest]
                self.loaded.append(digest)

    def advance(self, hold: AdapterHold) -> bool:
        digests = [ref.digest for ref in hold.refs]
        if hold.is_held or hold.error is not None:
            return hold.is_held
        if len(digests) > self.capacity:
            hold.error = InvalidInput.of("adapter", "too many")
            return False
        for digest in digests:
            if digest not in self.loaded and digest not in self.loading:
                self.loading[digest] = self.rng.randint(1, self.max_load_steps)
        if any(digest in self.loading for digest in digests):
            hold.lacks_room = False
            return False
        if self.failing.intersection(digests):
            self.loaded = [digest for digest in self.loaded if digest not in self.failing]
            hold.error = CorruptAdapter("it is broken")
            return False
        needed = {digest for digest, count in self.holds.items() if count} | set(digests)
        hold.lacks_room = len(needed) > self.capacity
        if not hold.lacks_room:
            self.holds.update(digests)
            idle = [digest for digest in self.loaded if digest not in needed]
            while len(self.loaded) > self.capacity and idle:
                self.loaded.remove(idle.pop(0))
                self.num_freed += 1  # waiting sequences may have to load it again
            hold.is_held = True
        return hold.is_held
