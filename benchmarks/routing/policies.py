"""Ways of choosing a replica: ours, and what it is compared with. Each is told what one router knows."""

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from benchmarks.routing.knowledge import DEAD, Knowledge
from benchmarks.routing.replicas import Host
from benchmarks.routing.world import RANK_BYTES, RANKS, Request, World
from server.cluster.rank import GOLDEN, number, rank, room


class Policy(Protocol):
    """`choose` gives a replica's index, or None: not now, ask again after `backoff` seconds."""

    contents: bool  # whether it asks what is resident and cached

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None: ...

    def backoff(self, request: Request) -> float: ...


class Immediate:
    """Never waits."""

    contents = False

    def backoff(self, request: Request) -> float:
        raise AssertionError("it chooses at once")


class Ours(Immediate):
    """The first of `rank`.

    The order is computed of those alone that can be first, which an index finds: who has a part or the shared
    text, and the best of the cold. A test holds it to the order of all.
    """

    contents = True

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        limit = room(*known.total())
        reports, queues = known.reports, known.queues
        able = {index for part in request.parts for index in reports.holders.get(part.digest, ())}
        able |= {index for text in request.prefix for index in reports.text_holders.get(text, ())}
        if request.parts:
            able.add(first_open(request, known, limit))
        else:
            able |= set(np.flatnonzero(queues == queues.min()).tolist())
        best = rank(request.parts, request.prefix, known.replicas(able), limit)[0]
        return int(best.removeprefix("replica-"))


def largest(request: Request) -> str:
    """The digest of the largest part."""
    return max((part.num_bytes, part.digest) for part in request.parts)[1]


def first_open(request: Request, known: Knowledge, limit: int) -> int:
    """Of the replicas with room, the first in the rendezvous order of the largest part."""
    home = number(largest(request))
    order = (known.reports.numbers ^ np.uint64(home)) * np.uint64(GOLDEN)
    return int(np.where(known.queues < limit, order, np.uint64(0)).argmax())


class RoundRobin(Immediate):
    def __init__(self, world: World) -> None:
        chance = random.Random(world.seed)
        self._next = [chance.randrange(world.num_replicas) for _ in range(world.num_routers)]

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        count = len(known.queues)
        while True:
            index = self._next[request.router] = (self._next[request.router] + 1) % count
            if known.queues[index] < DEAD:
                return index


class Random(Immediate):
    def __init__(self, world: World) -> None:
        self._chance = random.Random(world.seed)

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        while True:
            index = self._chance.randrange(len(known.queues))
            if known.queues[index] < DEAD:
                return index


class RandomOfTwo(Random):
    """The one with the shorter queue: what Ray Serve does by itself."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        first, second = super().choose(request, known, now), super().choose(request, known, now)
        assert first is not None and second is not None
        return first if known.queues[first] <= known.queues[second] else second


class Home(RandomOfTwo):
    """Consistent hashing: the adapter's home, however busy it is. For the base alone: one of two."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        if not request.parts:
            return super().choose(request, known, now)
        return first_open(request, known, DEAD)


class BoundedHome(RandomOfTwo):
    """Consistent hashing with bounded loads: the first in the adapter's order that has room."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        if not request.parts:
            return super().choose(request, known, now)
        return first_open(request, known, room(*known.total()))


class Multiplexed:
    """What `serve.multiplexed` does in Ray 2.60, retold from its router: the id is the largest part's, one a request.

    Two at random of the replicas that have the id, and of these the one with the shorter queue. Where none has it, or
    both are at `max_ongoing_requests`: two of those with the fewest ids. That for 1 to 2 s, with pauses from 25 to
    500 ms, and then two of all. It may wait while others are idle, and it knows nothing of the other parts.
    """

    contents = True
    TIMEOUT = 1.0
    BACKOFF, MAX_BACKOFF = 0.025, 0.5

    def __init__(self, world: World, hosts: Sequence[Host]) -> None:
        self._chance = random.Random(world.seed)
        self._hosts = hosts
        self._max_ongoing = round(1.25 * world.max_num_seqs)
        # Serve's own limit is a number of models, not bytes, so that all who are full have equally many
        self._full = world.capacity // max(RANK_BYTES * rows for rows in RANKS)

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        attempt, request.tries = request.tries, request.tries + 1
        alive = known.alive
        candidates: Sequence[int] = alive
        if request.parts:
            late = now - request.arrival > self._chance.uniform(self.TIMEOUT, 2 * self.TIMEOUT)
            holders = [i for i in known.reports.holders.get(largest(request), ()) if known.queues[i] < DEAD]
            if attempt == 0 and holders:
                candidates = sorted(holders)
            elif not late:
                counts = np.minimum(known.reports.num_resident[alive], self._full)
                candidates = alive[counts == counts.min()]
        chosen = self._chance.sample(range(len(candidates)), min(2, len(candidates)))
        pair = [int(candidates[place]) for place in chosen]
        open_ = [index for index in pair if known.queues[index] < self._max_ongoing]
        if open_:
            best = min(open_, key=lambda index: known.queues[index])
        else:  # asked again, since what is known may be old
            best = min(pair, key=lambda index: self._hosts[index].queue)
        return best if self._hosts[best].queue < self._max_ongoing else None  # else it refuses

    def backoff(self, request: Request) -> float:
        return 0.0 if request.tries < 2 else min(self.BACKOFF * 2 ** (request.tries - 2), self.MAX_BACKOFF)


POLICIES = {
    "ours": "`rank`",
    "multiplexed": "`serve.multiplexed`",
    "bounded": "consistent hashing, bounded",
    "home": "consistent hashing",
    "two": "random of two",
    "random": "random",
    "robin": "round-robin",
}


def policy(name: str, world: World, hosts: Sequence[Host]) -> Policy:
    match name:
        case "ours":
            return Ours()
        case "multiplexed":
            return Multiplexed(world, hosts)
        case "bounded":
            return BoundedHome(world)
        case "home":
            return Home(world)
        case "two":
            return RandomOfTwo(world)
        case "random":
            return Random(world)
        case "robin":
            return RoundRobin(world)
    raise ValueError(f"no policy {name}: {', '.join(POLICIES)}")
