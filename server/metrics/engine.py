"""Metrics of the engine, from a snapshot at each request: under our names, and under vLLM's names for gateways.

In a cluster, our metrics have the label `replica`, and of all API processes only one reports a replica. So sums
over all API processes count each replica once. Under vLLM's names, each API process reports sums over all
replicas, since a gateway chooses an API process by them.

The Gateway API's inference extension reads vLLM's names to choose a server. The value of `vllm:lora_requests_info`
is the time. Its labels say which adapters a request can use without loading, and for which adapters requests are
waiting. vLLM lists only running adapters in this metric. We list each resident adapter under every name that a
request may use: `tweets` for the latest version, `tweets@3`, `tweets@prod`, and compositions of resident adapters
only. An adapter of another project is listed with its project.

Gateways count each name as an adapter, and consider a server full if it lists `max_lora` names. So our `max_lora`
counts names, too.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.request import EngineStats
from server.metrics.aside import Aside

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_requests_running", "Sequences in the batch", lambda s: s.num_running),
    ("smolora_requests_waiting", "Sequences that wait to run", lambda s: s.num_waiting),
    ("smolora_kv_blocks", "Blocks of the KV cache", lambda s: s.kv_blocks_total),
    ("smolora_kv_blocks_used", "Blocks that a request refers to", lambda s: s.kv_blocks_used),
    ("smolora_adapters_resident", "Adapters in the engine's memory", lambda s: s.adapters_resident),
    (
        "smolora_adapters_waiting",
        "Adapters of waiting requests that aren't in memory; a sample if many wait",
        lambda s: len(s.waiting - s.resident),
    ),
    ("smolora_adapter_rows", "Rank rows in the engine's memory", lambda s: s.adapter_rows_total),
    ("smolora_adapter_rows_used", "Rank rows that resident adapters own", lambda s: s.adapter_rows_used),
    ("smolora_fallbacks", "Number of fallbacks that /ready lists", lambda s: len(s.fallbacks)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("smolora_adapter_loads", "Adapters loaded", lambda s: s.adapter_loads),
    ("smolora_adapter_evictions", "Adapters evicted", lambda s: s.adapter_evictions),
    ("smolora_prefix_cached_tokens", "Prompt tokens found in the prefix cache", lambda s: s.prefix_cached_tokens),
    ("smolora_prompt_tokens", "Prompt tokens processed", lambda s: s.prompt_tokens),
    ("smolora_generated_tokens", "Tokens generated", lambda s: s.output_tokens),
    ("smolora_drafted_tokens", "Tokens drafted by speculation", lambda s: s.drafted_tokens),
    ("smolora_accepted_tokens", "Drafted tokens that were accepted", lambda s: s.accepted_tokens),
    ("smolora_preemptions", "Sequences preempted", lambda s: s.preemptions),
    ("smolora_engine_steps", "Steps of the engine", lambda s: s.steps),
)


class StatsByReplica(Protocol):
    """Returns the snapshots of replicas by name: those that this process reports or, if `is_complete`, all.

    The name of an engine in this process is "".
    """

    def __call__(self, *, is_complete: bool) -> Mapping[str, EngineStats]: ...


class EngineCollector(Collector):
    """Collects metrics from the engines' snapshots under our names. `is_complete` is the argument for `stats`."""

    def __init__(self, stats: StatsByReplica) -> None:
        self._stats = stats
        self.is_complete = False

    def describe(self) -> Iterable[Metric]:
        return ()  # without this, registering would collect from an engine that doesn't exist yet

    def collect(self) -> Iterator[Metric]:
        found = self._stats(is_complete=self.is_complete)
        labels = [] if "" in found else ["replica"]
        kinds = ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily))
        for (name, text, value), kind in ((metric, kind) for metrics, kind in kinds for metric in metrics):
            family = kind(name, text, labels=labels)
            for replica, stats in found.items():
                family.add_metric([replica] if labels else [], value(stats))
            yield family


MAX_NAMES = 200
"""The most names in one label. Names without versions come first."""
TYPICAL_RANK = 16
"""`max_lora` assumes adapters of this rank, on all linear modules."""

Names = Callable[[frozenset[str]], list[str]]
"""Returns the names by which requests can refer to these digests, the most important first."""
Moves = Callable[[], object]
"""Returns a value that changes whenever a name may have come to refer to another digest."""


class GatewayCollector(Collector):
    """Collects metrics from the engine's snapshot, which `stats` returns, under vLLM's names.

    Names are looked up only after a change of the resident or awaited adapters, or of the catalog. If the lookup
    fails, the old names are kept.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], base_name: str, names: Names, moves: Moves, block_size: int
    ) -> None:
        self._stats = stats
        self._base_name = base_name
        self._names = names
        self._moves = moves
        self._block_size = block_size
        self._seen: tuple[object, ...] = ()
        self._labels = ("", "")  # names of resident adapters, and of awaited ones
        self._num_more = 0  # how many more names than adapters there are
        self._aside = Aside()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait to run", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the blocks that are in use, from 0 to 1", usage)
        yield self._loras(stats)
        labels = {"block_size": str(self._block_size), "num_gpu_blocks": str(stats.kv_blocks_total)}
        cache = GaugeMetricFamily("vllm:cache_config_info", "The cache of keys and values", labels=list(labels))
        cache.add_metric(list(labels.values()), 1)
        yield cache

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
        family.add_metric([self._base_name, "0"], value)
        return family

    def _loras(self, stats: EngineStats) -> Metric:
        state = (stats.resident, stats.waiting, self._moves())
        if state != self._seen:
            with suppress(Exception):  # the database failed, which `HomeCollector` logs
                digests = stats.resident, stats.waiting - stats.resident
                resident, waiting = self._aside.run(lambda: tuple(map(self._named, digests)))
                self._labels = ",".join(resident), ",".join(waiting)
                self._num_more = len(resident) + len(waiting) - len(stats.resident | stats.waiting)
                self._seen = state
        most = max(stats.max_adapter_rank // TYPICAL_RANK, stats.adapters_resident, 1)
        labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in memory, and awaited", labels=labels)
        running, awaited = self._labels
        family.add_metric([str(max(most + self._num_more, 1)), awaited, running], time.time())
        return family

    def _named(self, digests: frozenset[str]) -> list[str]:
        return self._names(digests)[:MAX_NAMES] if digests else []
