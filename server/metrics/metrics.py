"""A server's metrics: requests, lanes (limits on concurrent work), the process, and the collectors' metrics.

Gateways read /metrics many times a second and need current values, so collectors are read at each request. The
other metrics may be up to MAX_AGE old, so that rendering them takes at most RENDER_SHARE of the time.

Each server has its own registry. Labels are bounded: routes are templates, such as "/train/{job_id}", and paths
without a route share one label; past MAX_ADAPTER_LABELS distinct adapters, the rest share the label "other".
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.errors import InvalidInput, TryAgain
from server import __version__
from server.access.keys import KeyFault
from server.errors import QueueFull, ReadTooSlowly
from server.metrics.engine import EngineCollector, StatsByReplica

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HTTP_SECONDS = (
    0.005,
    0.025,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
    60.0,
)  # few buckets, since each of the many routes has them


def known_method(method: str) -> str:
    """Return the method of a request, or OTHER if HTTP doesn't define it: a client may send any word."""
    return method if method in METHODS else OTHER


class HttpMetrics:
    """HTTP requests by method, route and status, and their durations by route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._responses = Counter(
            "smolora_http_requests",
            "Requests that were answered, by status; 499: the client left before",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "smolora_http_request_seconds",
            "Request to the end of its answer, which for a stream is its last event",
            ["route"],
            buckets=_HTTP_SECONDS,
            registry=registry,
        )
        self._auth_failures = Counter(
            "smolora_auth_failures",
            "Requests whose key opened nothing, by reason",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(KeyFault):  # start at 0, so that Prometheus sees the first failure as an increase
            self._auth_failures.labels(reason)
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # cached, to count fast

    def refused(self, reason: KeyFault) -> None:
        """Count a request with an invalid key."""
        self._auth_failures.labels(reason).inc()

    def ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request that was answered. `route` is a template, or empty if the path has no route."""
        key = (known_method(method), route or OTHER, status)
        if (children := self._children.get(key)) is None:
            children = self._responses.labels(*map(str, key)), self._seconds.labels(key[1])
            self._children[key] = children
        counter, histogram = children
        counter.inc()
        histogram.observe(seconds)


_WAIT_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class LaneMetrics:
    """Metrics of lanes, which are limits on concurrent work: waits for a thread; and refused requests by reason.

    A reason is the name of a lane, or of another limit on concurrent work, that is full, or one of
    `server.errors.REASONS`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waits = Histogram(
            "smolora_lane_wait_seconds",
            "Waits for a thread of a lane, also of work that was refused or whose client left",
            ["lane"],
            buckets=_WAIT_SECONDS,
            registry=registry,
        )
        self._refusals = Counter(
            "smolora_refused",
            "Requests refused because something is full or used up, or because the key or the site isn't allowed",
            ["reason"],
            registry=registry,
        )

    def declare(self, name: str, *, is_lane: bool) -> None:
        """Create the Prometheus series of a lane or another reason of refusals, with value 0.

        Otherwise Prometheus wouldn't see the first refusal as an increase.
        """
        self._refusals.labels(name)
        if is_lane:
            self._waits.labels(name)

    def waited(self, lane: str, seconds: float) -> None:
        """Record how long a request has waited for a thread of a lane, which is a limit on concurrent work."""
        self._waits.labels(lane).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that was refused because of `reason`."""
        self._refusals.labels(reason).inc()


_LAG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LOOK_SECONDS = 0.25
_MAX_MISSED = 400
"""The most missed ticks that are added after a stall: 100 s of them."""


class LoopMetrics:
    """How late the event loop runs: all requests wait while something computes on it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lags = Histogram(
            "smolora_event_loop_lag_seconds",
            "Delay of a timer that is due four times a second",
            buckets=_LAG_SECONDS,
            registry=registry,
        )

    async def watch(self) -> None:
        """Measure the current event loop until cancelled.

        After a stall, the ticks that were due meanwhile count, too. Otherwise a stall would count as much as a
        punctual tick, however long it took.
        """
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOK_SECONDS
            await asyncio.sleep(_LOOK_SECONDS)
            lag = max(0.0, loop.time() - due)
            for missed in range(min(int(lag / _LOOK_SECONDS), _MAX_MISSED) + 1):
                self._lags.observe(lag - missed * _LOOK_SECONDS)


_THREADS = "/proc/self/task"


class ServerCollector(Collector):
    """The server's version, base, readiness and threads. `is_ready` returns whether /ready answers 200."""

    def __init__(self, base_name: str, is_ready: Callable[[], bool]) -> None:
        self._base_name = base_name
        self._is_ready = is_ready

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("smolora_build_info", "What runs here", labels=["version", "base"])
        info.add_metric([__version__, self._base_name], 1)
        yield info
        yield GaugeMetricFamily("smolora_ready", "1 while /ready says 200", value=int(self._is_ready()))
        with suppress(OSError):  # the system has no /proc
            threads = len(os.listdir(_THREADS))
            yield GaugeMetricFamily("process_threads", "Threads, Python's and others", value=threads)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ADAPTER_LABELS = 100
RENDER_SHARE = 0.1
MAX_AGE = 1.0
"""In seconds. Without this bound, counters could become stale: rendering looks slow if other processes compute."""

Outcome = Literal["completed", "cancelled", "failed", "refused", "invalid"]
"""How a generation request ended.

completed: all its choices are complete. cancelled: the client left, or read too slowly. failed: the engine failed.
refused: it was never accepted. invalid: its adapters are too large together, the model's numbers overflow under
these adapters, or its grammar is too complex.
"""

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def outcome_of(error: Exception) -> Outcome:
    """Return the outcome of a request that ended with this error from the engine."""
    if isinstance(error, InvalidInput):
        return "invalid"
    if isinstance(error, ReadTooSlowly):
        return "cancelled"
    return "refused" if isinstance(error, QueueFull) else "failed"  # a replica may refuse after submission


class Metrics:
    """All metrics of one server. The engines' snapshots, `stats`, and `collectors` are read at each request."""

    def __init__(
        self,
        stats: StatsByReplica,
        collectors: Iterable[Collector] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # a second series for each counter, with its start time, which nobody uses
        self._current = CollectorRegistry()
        self._engines = EngineCollector(stats)
        for collector in (self._engines, *collectors):
            self._current.register(collector)
        self._registry = CollectorRegistry()
        self._clock = clock
        self._counts, self._keep_until = b"", float("-inf")
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.http = HttpMetrics(self._registry)
        self.lanes = LaneMetrics(self._registry)
        self.loop = LoopMetrics(self._registry)
        self._labels: set[str] = set()
        self._requests = Counter(
            "smolora_requests", "Requests to generate, by outcome", ["outcome"], registry=self._registry
        )
        for outcome in get_args(Outcome):  # start at 0, so that Prometheus sees the first failure as an increase
            self._requests.labels(outcome)
        self._first_token = self._histogram("smolora_time_to_first_token_seconds", "Request to its first token")
        self._inter_token = self._histogram("smolora_inter_token_seconds", "Between tokens of one choice")
        self._queue = self._histogram("smolora_queue_seconds", "Request to its first step")
        self._request = self._histogram("smolora_request_seconds", "Request to its end, of completed ones")
        self._adapter_requests = Counter(
            "smolora_adapter_requests", "Requests, by adapter", ["adapter"], registry=self._registry
        )
        self._adapter_tokens = Counter(
            "smolora_adapter_tokens", "Generated tokens, by adapter", ["adapter"], registry=self._registry
        )
        self.observe_first_token = self._first_token.observe
        self.observe_inter_token = self._inter_token.observe
        self.observe_queue = self._queue.observe

    def add(self, collector: Collector) -> None:
        """Add a collector, which is read at each request."""
        self._current.register(collector)

    def accepted(self, adapters: Iterable[str]) -> None:
        """Count a request that is passed to the engine, once for each of its adapters ("base" if it has none)."""
        for name in {self._label(name) for name in adapters}:
            self._adapter_requests.labels(name).inc()

    def ended(self, outcome: Outcome, seconds: float, adapters: Iterable[str], num_tokens: int) -> None:
        """Count a request's outcome, seconds and generated tokens.

        Each of the request's adapters is credited with all tokens.
        """
        self._requests.labels(outcome).inc()
        if outcome == "completed":
            self._request.observe(seconds)
        for name in {self._label(name) for name in adapters}:
            self._adapter_tokens.labels(name).inc(num_tokens)

    def refused(self) -> None:
        """Count a valid request that wasn't accepted because the queue is full or the server isn't serving."""
        self._requests.labels("refused").inc()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a refused request if the block raises TryAgain."""
        try:
            yield
        except TryAgain:
            self.refused()
            raise

    def render(self, *, all_replicas: bool = False) -> bytes:
        """Return the metrics in Prometheus' text format. `all_replicas`: also of replicas that others report.

        This takes milliseconds, may do disk I/O, and isn't thread-safe.
        """
        if (started := self._clock()) >= self._keep_until:
            self._counts = generate_latest(self._registry)
            now = self._clock()
            self._keep_until = now + min((now - started) * (1 / RENDER_SHARE - 1), MAX_AGE)
        self._engines.is_complete = all_replicas
        return generate_latest(self._current) + self._counts

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def _label(self, name: str) -> str:
        if name in self._labels:
            return name
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            return OTHER
        self._labels.add(name)
        return name
