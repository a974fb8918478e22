"""Metrics for gateways in vLLM's format: counts, and the resident adapters by name."""

import time
from collections.abc import Collection

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import EngineStats
from server.metrics.engine import MAX_NAMES, GatewayCollector
from server.metrics.metrics import Metrics
from tests.kits.monitoring import of_one


class Catalog:
    """A catalog that names a digest after itself, and counts lookups."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.moves = 0

    def names(self, digests: Collection[str]) -> list[str]:
        self.num_asked += 1
        return [f"name-of-{digest}" for digest in sorted(digests)]


def families(stats: EngineStats, catalog: Catalog) -> dict[str, Metric]:
    collector = GatewayCollector(lambda: stats, "tiny", catalog.names, lambda: catalog.moves, 16)
    text = Metrics(of_one(lambda: stats), [collector]).render().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_counts_are_vllms() -> None:
    stats = EngineStats(num_running=3, num_waiting=7, kv_blocks_total=512, kv_blocks_used=128)
    found = families(stats, Catalog())
    for name, value in (("num_requests_running", 3), ("num_requests_waiting", 7), ("kv_cache_usage_perc", 0.25)):
        (sample,) = found[f"vllm:{name}"].samples
        assert (sample.labels, sample.value) == ({"model_name": "tiny", "engine": "0"}, value)
        assert found[f"vllm:{name}"].type == "gauge"
    (cache,) = found["vllm:cache_config_info"].samples
    assert cache.labels == {"block_size": "16", "num_gpu_blocks": "512"}


def test_resident_and_awaited_adapters_are_labels_with_the_current_time() -> None:
    stats = EngineStats(
        adapters_resident=2,
        max_adapter_rank=100,
        resident=frozenset({"a", "b"}),
        waiting=frozenset({"b", "c"}),
    )
    before = time.time()
    (sample,) = families(stats, Catalog())["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "6",  # of rank 16
        "running_lora_adapters": "name-of-a,name-of-b",
        "waiting_lora_adapters": "name-of-c",  # b needs no wait
    }
    assert before <= sample.value <= time.time()


def test_max_lora_is_never_less_than_the_resident_adapters() -> None:
    stats = EngineStats(adapters_resident=9, max_adapter_rank=16)
    (sample,) = families(stats, Catalog())["vllm:lora_requests_info"].samples
    assert sample.labels["max_lora"] == "9"
    (sample,) = families(EngineStats(max_adapter_rank=1), Catalog())["vllm:lora_requests_info"].samples
    assert sample.labels == {"max_lora": "1", "running_lora_adapters": "", "waiting_lora_adapters": ""}


def test_max_lora_leaves_room_whatever_the_number_of_names() -> None:
    """Gateways count names: they consider a server full once it reports `max_lora` of them."""

    def two_names(digests: Collection[str]) -> list[str]:
        return [*digests, *(f"{digest}@1" for digest in digests)]

    def is_full(num_resident: int, num_waiting: int = 0) -> bool:
        resident = frozenset(f"r{number}" for number in range(num_resident))
        waiting = frozenset(f"w{number}" for number in range(num_waiting))
        stats = EngineStats(
            adapters_resident=num_resident, max_adapter_rank=10 * 16, resident=resident, waiting=waiting
        )
        collector = GatewayCollector(lambda: stats, "tiny", two_names, lambda: 0, 16)
        found = {family.name: family for family in collector.collect()}
        (sample,) = found["vllm:lora_requests_info"].samples
        listed = [sample.labels[f"{kind}_lora_adapters"] for kind in ("running", "waiting")]
        return sum(len(set(names.split(","))) for names in listed if names) >= int(sample.labels["max_lora"])

    assert [number for number in range(13) if is_full(number)] == [10, 11, 12]
    assert not is_full(6, 3)
    assert is_full(6, 4)


def test_names_are_looked_up_only_after_a_change() -> None:
    current, catalog = EngineStats(resident=frozenset("a")), Catalog()
    collector = GatewayCollector(lambda: current, "tiny", catalog.names, lambda: catalog.moves, 16)
    for _ in range(3):
        list(collector.collect())
    assert catalog.num_asked == 1
    catalog.moves += 1
    list(collector.collect())
    assert catalog.num_asked == 2
    current = EngineStats(resident=frozenset("ab"))
    list(collector.collect())
    assert catalog.num_asked == 3


def test_a_label_lists_a_bounded_number_of_names() -> None:
    stats = EngineStats(resident=frozenset(map(str, range(1000))))
    (sample,) = families(stats, Catalog())["vllm:lora_requests_info"].samples
    assert len(sample.labels["running_lora_adapters"].split(",")) == MAX_NAMES


def test_a_database_error_stops_no_scrape() -> None:
    def broken(digests: Collection[str]) -> list[str]:
        raise OSError("disk I/O error")

    stats = EngineStats(resident=frozenset("a"))
    collector = GatewayCollector(lambda: stats, "tiny", broken, lambda: 0, 16)
    found = {family.name: family for family in collector.collect()}
    assert found["vllm:lora_requests_info"].samples[0].labels["running_lora_adapters"] == ""
    assert "vllm:kv_cache_usage_perc" in found
