"""The engine's own snapshot under our names, read when /metrics is asked for."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.request import EngineStats

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_requests_running", "Sequences in the batch", lambda s: s.num_running),
    ("smolora_requests_waiting", "Sequences that wait to run", lambda s: s.num_waiting),
    ("smolora_kv_blocks", "Blocks of keys and values there are", lambda s: s.kv_blocks_total),
    ("smolora_kv_blocks_used", "Blocks that a request refers to", lambda s: s.kv_blocks_used),
    ("smolora_adapters_resident", "Adapters in the engine's memory", lambda s: s.adapters_resident),
    ("smolora_adapter_rows", "Rank rows there are", lambda s: s.adapter_rows_total),
    ("smolora_adapter_rows_used", "Rank rows that resident adapters own", lambda s: s.adapter_rows_used),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_adapter_loads", "Adapters read and placed", lambda s: s.adapter_loads),
    ("smolora_adapter_evictions", "Adapters dropped for others", lambda s: s.adapter_evictions),
    ("smolora_prefix_cached_tokens", "Prompt tokens found in the cache", lambda s: s.prefix_cached_tokens),
    ("smolora_prompt_tokens", "Prompt tokens taken in", lambda s: s.prompt_tokens),
    ("smolora_generated_tokens", "Tokens generated", lambda s: s.output_tokens),
    ("smolora_drafted_tokens", "Tokens guessed and computed ahead", lambda s: s.drafted_tokens),
    ("smolora_accepted_tokens", "Of the drafted tokens, those that were drawn", lambda s: s.accepted_tokens),
    ("smolora_preemptions", "Sequences put back to waiting", lambda s: s.preemptions),
    ("smolora_engine_steps", "Steps of the engine", lambda s: s.steps),
)


class EngineCollector(Collector):
    """`stats` gives the snapshot."""

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
