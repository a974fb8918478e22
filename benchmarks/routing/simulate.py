"""Discrete-event simulation of one policy in one world."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from benchmarks.routing.knowledge import DEAD, Knowledge, Reports
from benchmarks.routing.policies import policy
from benchmarks.routing.replicas import Host, Started
from benchmarks.routing.world import Request, World, adapters, requests
from server.cluster.rank import Part


@dataclass(frozen=True)
class Outcome:
    """Figures over the counted requests."""

    policy: str
    world: str  # title of the world
    cold_share: float  # share of requests that loaded an adapter
    bytes_loaded: float  # mean per request
    cached_share: float  # share of requests with a shared text whose text was cached
    wait_p50: float  # seconds from arrival to first token: queue, loading, prefill, router's pauses
    wait_p99: float
    wait_p999: float
    queue_p99: float  # seconds of waiting in the queue
    imbalance: float  # longest queue / mean queue, mean over all reports
    homes: int  # replicas at the end on which the most popular adapter is resident
    retried: int  # requests whose replica failed while serving them, or was down when chosen


@dataclass(eq=False)
class Counts:
    waits: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    cold: int = 0
    num_bytes: int = 0
    texts: int = 0
    cached: int = 0
    retried: int = 0
    imbalances: list[float] = field(default_factory=list)


class Simulation:
    """A simulation. All times are on one clock that starts at 0."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.hosts = [Host(index, world) for index in range(world.num_replicas)]
        self.policy = policy(name, world, self.hosts)
        self.reports = Reports.of(world.num_replicas)
        self.known = [Knowledge.of(self.reports) for _ in range(world.num_routers)]
        self.counts = Counts()
        self._unended = world.num_requests
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()  # breaks ties between simultaneous events
        self._chance = random.Random(world.seed + 2)
        self._measuring = False  # from the first counted request to the arrival of the last
        self._fill()

    def _fill(self) -> None:
        """Fill replicas as for any policy: adapters at their rendezvous homes, the most popular first, as far as
        they fit."""
        placed: list[list[Part]] = [[] for _ in self.hosts]
        for part in adapters(self.world):
            placed[int(self.reports.order(part.digest).argmax())].append(part)
        for host, parts in zip(self.hosts, placed, strict=True):
            host.fill(parts)

    def run(self) -> Outcome:
        """Run until the last request has ended."""
        arrivals = requests(self.world)
        coming = next(arrivals, None)
        self._at(0.0, self._report)
        if self.world.failures:
            self._at(self._chance.expovariate(self.world.failures), self._fail)
        while self._unended:
            if coming is not None and coming.arrival <= self._events[0][0]:
                self._measuring = coming.counted
                self._route(coming, coming.arrival)
                coming = next(arrivals, None)
                self._measuring &= coming is not None
            else:
                now, _, happen = heapq.heappop(self._events)
                happen(now)
        return self._outcome()

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen))

    def _route(self, request: Request, now: float) -> None:
        known = self.known[request.router]
        while True:
            index = self.policy.choose(request, known, now)
            if index is None:
                self._at(now + self.policy.backoff(request), partial(self._route, request))
                return
            host = self.hosts[index]
            if host.up:
                break
            known.queues[index] = DEAD  # discovered by the failed attempt
            self.counts.retried += request.counted
        known.queues[index] += self.world.own_counts
        host.waiting.append(request)
        self._start(host, now)

    def _start(self, host: Host, now: float) -> None:
        while (started := host.start(now)) is not None:
            self._at(started.end, partial(self._end, host, host.life, started, now))

    def _end(self, host: Host, life: int, started: Started, began: float, now: float) -> None:
        if host.life != life:
            return  # the replica failed meanwhile, and the request was retried elsewhere
        self._unended -= 1
        host.finish(started.request)
        self._start(host, now)
        if started.request.counted:
            counts, request = self.counts, started.request
            counts.waits.append(started.first_token - request.arrival)
            counts.queued.append(began - request.arrival)
            counts.cold += started.loads > 0
            counts.num_bytes += started.loaded_bytes
            counts.texts += len(request.prefix)
            counts.cached += started.cached and len(request.prefix)

    def _report(self, now: float) -> None:
        self.reports.update(self.hosts, contents=self.policy.contents)
        for known in self.known:
            known.refresh()
        if self._measuring:
            queues = self.reports.queues[self.reports.queues < DEAD]
            self.counts.imbalances.append(float(queues.max() / queues.mean()))
        self._at(now + self.world.report_every, self._report)

    def _fail(self, now: float) -> None:
        host = self._chance.choice(self.hosts)
        if host.up:
            lost = host.fail()
            self.counts.retried += sum(request.counted for request in lost)
            for request in lost:
                request.tries = 0
                self._at(now, partial(self._route, request))
            self._at(now + self.world.downtime, host.come_back)
        self._at(now + self._chance.expovariate(self.world.failures), self._fail)

    def _outcome(self) -> Outcome:
        counts, ended = self.counts, len(self.counts.waits)
        p50, p99, p999 = (float(value) for value in np.percentile(counts.waits, (50, 99, 99.9)))
        return Outcome(
            policy=self.name,
            world=self.world.title,
            cold_share=counts.cold / ended,
            bytes_loaded=counts.num_bytes / ended,
            cached_share=counts.cached / max(1, counts.texts),
            wait_p50=p50,
            wait_p99=p99,
            wait_p999=p999,
            queue_p99=float(np.percentile(counts.queued, 99)),
            imbalance=float(np.mean(counts.imbalances)),
            homes=sum("00000" in host.resident for host in self.hosts),
            retried=counts.retried,
        )


def simulate(job: tuple[str, World]) -> Outcome:
    """Run one simulation. The arguments are one tuple, for a process pool."""
    return Simulation(*job).run()
