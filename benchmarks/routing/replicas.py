"""A simulated engine replica: batch slots, a queue, resident adapters and a prefix cache."""

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.routing.world import PREFIX_TOKENS, Request, World
from server.cluster.rank import Part


@dataclass(eq=False)
class Started:
    """A request that a replica has started."""

    request: Request
    first_token: float  # time of the first token
    end: float
    loads: int  # adapters that had to be loaded
    loaded_bytes: int
    cached: bool  # whether its shared text was cached


@dataclass(eq=False)
class Host:
    """A replica. Adapters of running requests stay; of the others the least recently used is evicted first."""

    index: int
    world: World
    up: bool = True
    life: int = 0  # number of its failures
    changed: bool = True  # since its last report
    running: set[Request] = field(default_factory=set)
    waiting: deque[Request] = field(default_factory=deque)
    resident: OrderedDict[str, int] = field(default_factory=OrderedDict)  # bytes by digest
    num_bytes: int = 0
    ready: dict[str, float] = field(default_factory=dict)  # time at which it is loaded, by digest
    holds: Counter[str] = field(default_factory=Counter)
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def queue(self) -> int:
        return len(self.running) + len(self.waiting)

    def fill(self, parts: Sequence[Part]) -> None:
        """Fill the caches before the first request, in order of recency, with the parts that fit."""
        fitting: list[Part] = []
        for part in parts:
            if self.num_bytes + part.num_bytes > self.world.capacity:
                break
            self.num_bytes += part.num_bytes
            fitting.append(part)
        for part in reversed(fitting):
            self.resident[part.digest], self.ready[part.digest] = part.num_bytes, 0.0

    def start(self, now: float) -> Started | None:
        """Start the next request if a slot and room for its adapters are free."""
        if not self.waiting or len(self.running) >= self.world.max_num_seqs:
            return None
        request = self.waiting[0]
        missing = [part for part in request.parts if part.digest not in self.resident]
        wanted = sum(part.num_bytes for part in missing)
        keep = {part.digest for part in request.parts}
        if not self._make_room(wanted, keep):
            return None
        self.waiting.popleft()
        self.running.add(request)
        self.changed = True
        loaded = now
        for part in missing:
            loaded += self.world.load_latency + part.num_bytes / self.world.load_bandwidth
            self.resident[part.digest], self.ready[part.digest] = part.num_bytes, loaded
        self.num_bytes += wanted
        for part in request.parts:
            self.resident.move_to_end(part.digest)
            self.holds[part.digest] += 1
        loaded = max((self.ready[part.digest] for part in request.parts), default=now)
        hit = all(text in self.cached for text in request.prefix)
        tokens = request.prompt_tokens + (0 if hit else PREFIX_TOKENS * len(request.prefix))
        for text in request.prefix:
            self.cached[text] = None
            self.cached.move_to_end(text)
            if len(self.cached) > self.world.prefix_places:
                self.cached.popitem(last=False)
        first = max(now, loaded) + tokens * self.world.prefill_time
        end = first + request.output_tokens * self.world.batch_token_time(len(self.running))
        return Started(request, first, end, len(missing), wanted, hit)

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        for part in request.parts:
            self.holds[part.digest] -= 1
            if not self.holds[part.digest]:
                del self.holds[part.digest]

    def fail(self) -> list[Request]:
        """Fail and restart empty; return the lost requests, oldest first."""
        lost = sorted([*self.running, *self.waiting], key=lambda request: request.arrival)
        for kept in (self.running, self.waiting, self.resident, self.ready, self.holds, self.cached):
            kept.clear()
        self.num_bytes, self.up, self.life, self.changed = 0, False, self.life + 1, True
        return lost

    def come_back(self, now: float) -> None:
        self.up = True

    def _make_room(self, wanted: int, keep: set[str]) -> bool:
        excess = self.num_bytes + wanted - self.world.capacity
        if excess <= 0:
            return True
        gone = []
        for digest, num_bytes in self.resident.items():
            if excess <= 0:
                break
            if digest not in self.holds and digest not in keep:
                gone.append(digest)
                excess -= num_bytes
        if excess > 0 and self.running:
            return False  # until a running request ends
        for digest in gone:
            self.num_bytes -= self.resident.pop(digest)
            del self.ready[digest]
        return True
