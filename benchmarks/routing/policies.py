"""Policies for choosing a replica: ours and its alternatives. Each sees what one router knows."""

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from benchmarks.routing.knowledge import DEAD, Knowledge
from benchmarks.routing.replicas import Host
from benchmarks.routing.world import RANK_BYTES, RANKS, Request, World
from server.cluster.rank import rank, room


class Policy(Protocol):
    """A routing policy. `choose` returns a replica's index, or None to retry after `backoff` seconds."""

    contents: bool  # whether it uses resident adapters and cached prefixes

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None: ...

    def backoff(self, request: Request) -> float: ...


class Immediate:
    """A policy that never waits."""

    contents = False

    def backoff(self, request: Request) -> float:
        raise AssertionError("it chooses at once")


class Ours(Immediate):
    """Our policy: the first replica in the order of `rank`.

    Only candidates for the first place are ordered; an index finds them: the replicas with the shared text; of
    replicas with the same parts, the shortest queues; the best cold replica. A test compares it with ordering all
    replicas.
    """

    contents = True

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        limit = room(*known.total())
        reports, queues = known.reports, known.queues
        able = {index for text in request.prefix for index in reports.text_holders.get(text, ())}
        if not request.parts:
            able |= set(np.flatnonzero(queues == queues.min()).tolist())
        else:
            able.add(first_open(request, known, limit))
            alike = np.zeros(len(queues), np.int64)  # a bit for each part that is resident
            for place, part in enumerate(request.parts):
                alike[known.holders(part.digest)] |= 1 << place
            for bits in range(1, 1 << len(request.parts)):
                indices = np.flatnonzero(alike == bits)
                able |= set(indices[queues[indices] == queues[indices].min(initial=DEAD)].tolist())
        best = rank(request.parts, request.prefix, known.replicas(able), limit)[0]
        return int(best.removeprefix("replica-"))


def largest(request: Request) -> str:
    """Return the digest of the largest part."""
    return max((part.num_bytes, part.digest) for part in request.parts)[1]


def first_open(request: Request, known: Knowledge, limit: int) -> int:
    """Return the first replica with room in the rendezvous order of the largest part."""
    order = known.reports.order(largest(request))
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
        return self._random(known)

    def _random(self, known: Knowledge) -> int:
        while True:
            index = self._chance.randrange(len(known.queues))
            if known.queues[index] < DEAD:
                return index


class RandomOfTwo(Random):
    """Power of two choices: the shorter queue of two random replicas, as Ray Serve does by default."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        first, second = self._random(known), self._random(known)
        return first if known.queues[first] <= known.queues[second] else second


class Home(RandomOfTwo):
    """Consistent hashing: the adapter's home, however busy. Requests for the base use power of two choices."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        if not request.parts:
            return super().choose(request, known, now)
        return first_open(request, known, DEAD)


class BoundedHome(RandomOfTwo):
    """Consistent hashing with bounded loads: the first replica with room in the adapter's order."""

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        if not request.parts:
            return super().choose(request, known, now)
        return first_open(request, known, room(*known.total()))


class Multiplexed:
    """The behaviour of `serve.multiplexed`, reimplemented after Ray 2.60's router: one id per request, the largest
    part's.

    It takes the shorter queue of two random replicas that have the id. If none has it, or both have
    `max_ongoing_requests`, it takes two of the replicas with the fewest ids, for 1 to 2 s with pauses of 25 to 500
    ms, and then any two. A request may wait while other replicas are idle. Other parts and cached prefixes don't
    count.
    """

    contents = True
    TIMEOUT = 1.0
    BACKOFF, MAX_BACKOFF = 0.025, 0.5

    def __init__(self, world: World, hosts: Sequence[Host]) -> None:
        self._chance = random.Random(world.seed)
        self._hosts = hosts
        self._max_ongoing = round(1.25 * world.max_num_seqs)
        # Serve limits the number of models, not their bytes: all full replicas have the same number.
        self._full = world.capacity // max(RANK_BYTES * rows for rows in RANKS)

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        attempt, request.tries = request.tries, request.tries + 1
        alive = known.alive
        candidates = alive
        if request.parts:
            late = now - request.arrival > self._chance.uniform(self.TIMEOUT, 2 * self.TIMEOUT)
            holders = known.holders(largest(request))
            holders = holders[known.queues[holders] < DEAD]
            if attempt == 0 and len(holders):
                candidates = holders
            elif not late:
                counts = np.minimum(known.reports.num_resident[alive], self._full)
                candidates = alive[counts == counts.min()]
        chosen = self._chance.sample(range(len(candidates)), min(2, len(candidates)))
        pair = [int(candidates[place]) for place in chosen]
        open_ = [index for index in pair if known.queues[index] < self._max_ongoing]
        if open_:
            best = min(open_, key=lambda index: known.queues[index])
        else:  # queried again, as reports may be stale
            best = min(pair, key=lambda index: self._hosts[index].queue)
        return best if self._hosts[best].queue < self._max_ongoing else None  # None: the replica refuses

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
