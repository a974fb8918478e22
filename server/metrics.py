"""What /metrics shows: the engine's own snapshot, read when asked, and what requests saw from outside.

One registry for each server. Names of adapters are labels, and there is no bound on adapters: past
MAX_ADAPTER_LABELS distinct ones, the rest share the label "other".
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.request import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ADAPTER_LABELS = 100
OTHER = "other"

Outcome = Literal["completed", "cancelled", "failed", "refused"]
"""How a request ended: all its choices did, the client left, the engine failed it, or it was never taken."""

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_requests_running", "Sequences in the batch", lambda s: s.num_running),
    ("smolora_requests_waiting", "Sequences that wait to run", lambda s: s.num_waiting),
    ("smolora_kv_blocks", "Blocks of keys and values there are", lambda s: s.kv_blocks_total),
    ("smolora_kv_blocks_used", "Blocks that a request refers to", lambda s: s.kv_blocks_used),
    ("smolora_adapters_resident", "Adapters in the engine's memory", lambda s: s.adapters_resident),
    ("smolora_adapter_rows_used", "Rank rows that resident adapters own", lambda s: s.adapter_rows_used),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_adapter_loads", "Adapters read and placed", lambda s: s.adapter_loads),
    ("smolora_adapter_evictions", "Adapters dropped for others", lambda s: s.adapter_evictions),
    ("smolora_prefix_cached_tokens", "Prompt tokens found in the cache", lambda s: s.prefix_cached_tokens),
    ("smolora_prompt_tokens", "Prompt tokens taken in", lambda s: s.prompt_tokens),
    ("smolora_generated_tokens", "Tokens generated", lambda s: s.output_tokens),
    ("smolora_preemptions", "Sequences put back to waiting", lambda s: s.preemptions),
    ("smolora_engine_steps", "Steps of the engine", lambda s: s.steps),
)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask an engine that isn't there yet

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, value in _GAUGES:
            yield GaugeMetricFamily(name, text, value=value(stats))
        for name, text, value in _COUNTERS:
            yield CounterMetricFamily(name, text, value=value(stats))


class Metrics:
    """Counts of one server. `stats` gives the engine's snapshot; called when /metrics is."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._labels: set[str] = set()
        self._requests = Counter(
            "smolora_requests", "Requests to generate, by outcome", ["outcome"], registry=self._registry
        )
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

    def accepted(self, adapters: Iterable[str]) -> None:
        """A request under these adapters ("base" where there are none) goes to the engine."""
        for name in {self._label(name) for name in adapters}:
            self._adapter_requests.labels(name).inc()

    def ended(self, outcome: Outcome, seconds: float, adapters: Iterable[str], num_tokens: int) -> None:
        """It ended after so many seconds and generated tokens; every one of its adapters had a part in each."""
        self._requests.labels(outcome).inc()
        if outcome == "completed":
            self._request.observe(seconds)
        for name in {self._label(name) for name in adapters}:
            self._adapter_tokens.labels(name).inc(num_tokens)

    def refused(self) -> None:
        """A well-formed request was not taken: the queue is full, or nothing is served now."""
        self._requests.labels("refused").inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def _label(self, name: str) -> str:
        if name in self._labels:
            return name
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            return OTHER
        self._labels.add(name)
        return name
