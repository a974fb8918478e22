"""How long slow work waits for a thread, and what is refused because something is full."""

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class LaneMetrics:
    """The counts of one server's lanes and bounds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waits = Histogram(
            "smolora_lane_wait_seconds",
            "Waits for a thread of a lane, also of work that was refused or whose client left",
            ["lane"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._refusals = Counter(
            "smolora_refused",
            "Requests refused with 429 because a lane or another bound was full, by its name",
            ["reason"],
            registry=registry,
        )

    def declare(self, name: str, *, is_lane: bool) -> None:
        """Show the series from the start, so that the first refusal is a rise from 0."""
        self._refusals.labels(name)
        if is_lane:
            self._waits.labels(name)

    def waited(self, lane: str, seconds: float) -> None:
        """Count a wait that has ended."""
        self._waits.labels(lane).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._refusals.labels(reason).inc()
