"""/metrics: the contract's names, the engine's numbers, and a bound on labels."""

from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import EngineStats
from server.metrics import MAX_ADAPTER_LABELS, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_the_engines_numbers_are_read_when_asked() -> None:
    stats = EngineStats(num_running=2, num_waiting=3, kv_blocks_total=9, kv_blocks_used=4, adapters_resident=5)
    current = [stats]
    metrics = Metrics(lambda: current[0])
    found = samples(metrics)
    assert found["smolora_requests_running", ()] == 2
    assert found["smolora_requests_waiting", ()] == 3
    assert found["smolora_kv_blocks_used", ()] == 4
    assert found["smolora_adapters_resident", ()] == 5
    current[0] = EngineStats(output_tokens=11, adapter_evictions=6)
    found = samples(metrics)
    assert found["smolora_requests_running", ()] == 0
    assert found["smolora_generated_tokens_total", ()] == 11
    assert found["smolora_adapter_evictions_total", ()] == 6


def test_requests_are_counted_by_outcome_and_adapter() -> None:
    metrics = Metrics(EngineStats)
    metrics.accepted({"a", "b"})
    metrics.ended("completed", 0.2, {"a", "b"}, 12)
    metrics.accepted({"a"})
    metrics.ended("cancelled", 9.0, {"a"}, 3)
    metrics.refused()
    found = samples(metrics)
    assert found["smolora_requests_total", (("outcome", "completed"),)] == 1
    assert found["smolora_requests_total", (("outcome", "cancelled"),)] == 1
    assert found["smolora_requests_total", (("outcome", "refused"),)] == 1
    assert found["smolora_adapter_requests_total", (("adapter", "a"),)] == 2
    assert found["smolora_adapter_tokens_total", (("adapter", "a"),)] == 15
    assert found["smolora_adapter_tokens_total", (("adapter", "b"),)] == 12
    assert found["smolora_request_seconds_count", ()] == 1


def test_labels_are_bounded() -> None:
    metrics = Metrics(EngineStats)
    for number in range(MAX_ADAPTER_LABELS + 50):
        metrics.accepted({f"adapter-{number}"})
    metrics.accepted({"adapter-0"})  # still under its own name
    found = samples(metrics)
    named = {labels: value for (name, labels), value in found.items() if name == "smolora_adapter_requests_total"}
    assert len(named) == MAX_ADAPTER_LABELS + 1
    assert named[(("adapter", "other"),)] == 50
    assert named[(("adapter", "adapter-0"),)] == 2


def test_servers_share_no_numbers() -> None:
    one, other = Metrics(EngineStats), Metrics(EngineStats)
    one.refused()
    assert ("smolora_requests_total", (("outcome", "refused"),)) not in samples(other)
