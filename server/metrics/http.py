"""Requests as HTTP sees them: how many by method, route and status, and how long by route.

Routes are templates, "/train/{job_id}", and what is none shares one label, so that clients can't make any. Cached
children make counting a dictionary's look-up.
"""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.access.key_ring import KeyFault

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)  # of each route: few, since there are many routes


class HttpMetrics:
    """The counts of one server."""

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
            buckets=_SECONDS,
            registry=registry,
        )
        self._auth_failures = Counter(
            "smolora_auth_failures",
            "Requests whose key opened nothing, by reason",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(KeyFault):  # so that the first one is a rise from 0, which rates see
            self._auth_failures.labels(reason)
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def refused(self, reason: KeyFault) -> None:
        """Count a request whose key opened nothing."""
        self._auth_failures.labels(reason).inc()

    def ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer that has ended. `route` is a template, or empty if the path has no route."""
        key = (method if method in METHODS else OTHER, route or OTHER, status)
        if (children := self._children.get(key)) is None:
            children = self._responses.labels(*map(str, key)), self._seconds.labels(key[1])
            self._children[key] = children
        counter, histogram = children
        counter.inc()
        histogram.observe(seconds)
