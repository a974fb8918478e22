"""/metrics: the names of the contract, the engine's numbers, and a bound on labels."""

import asyncio
import os
import threading
import time
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import __version__
from server.engine.request import EngineStats
from server.metrics.metrics import MAX_ADAPTER_LABELS, MAX_AGE, Metrics, ServerCollector
from server.metrics.quotas import QuotaCollector
from tests.kits.monitoring import of_one


def samples(
    metrics: Metrics, *, all_replicas: bool = False
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render(all_replicas=all_replicas).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_replicas_have_a_label_and_those_of_other_reporters_appear_only_on_request() -> None:
    own, other = EngineStats(num_running=2, output_tokens=7), EngineStats(num_running=5, output_tokens=9)

    def by_replica(*, is_complete: bool) -> Mapping[str, EngineStats]:
        return {"one": own, "two": other} if is_complete else {"one": own}

    one, two = (("replica", "one"),), (("replica", "two"),)
    metrics = Metrics(by_replica)
    for found in (samples(metrics), samples(metrics, all_replicas=True), samples(metrics)):
        assert (found["smolora_requests_running", one], found["smolora_generated_tokens_total", one]) == (2, 7)
        assert ("smolora_requests_running", ()) not in found
    assert ("smolora_requests_running", two) not in samples(metrics)
    both = samples(metrics, all_replicas=True)
    assert (both["smolora_requests_running", two], both["smolora_generated_tokens_total", two]) == (5, 9)


def test_the_engines_numbers_are_read_when_asked() -> None:
    stats = EngineStats(num_running=2, num_waiting=3, kv_blocks_total=9, kv_blocks_used=4, adapters_resident=5)
    current = [stats]
    metrics = Metrics(of_one(lambda: current[0]))
    found = samples(metrics)
    assert found["smolora_requests_running", ()] == 2
    assert found["smolora_requests_waiting", ()] == 3
    assert found["smolora_kv_blocks_used", ()] == 4
    assert found["smolora_adapters_resident", ()] == 5
    current[0] = EngineStats(output_tokens=11, adapter_evictions=6, drafted_tokens=8, accepted_tokens=5)
    found = samples(metrics)
    assert found["smolora_requests_running", ()] == 0
    assert found["smolora_generated_tokens_total", ()] == 11
    assert found["smolora_adapter_evictions_total", ()] == 6
    assert found["smolora_drafted_tokens_total", ()] == 8
    assert found["smolora_accepted_tokens_total", ()] == 5


def test_fallbacks_are_counted() -> None:
    stats = EngineStats(fallbacks=frozenset({"no CUDA graphs: a reason"}))
    assert samples(Metrics(of_one(lambda: stats)))["smolora_fallbacks", ()] == 1
    assert samples(Metrics(of_one(EngineStats)))["smolora_fallbacks", ()] == 0


def test_adapters_that_wait_are_counted_unless_they_are_resident() -> None:
    stats = EngineStats(resident=frozenset({"a", "b"}), waiting=frozenset({"b", "c", "d"}))
    assert samples(Metrics(of_one(lambda: stats)))["smolora_adapters_waiting", ()] == 2


@pytest.mark.anyio
async def test_a_blocked_event_loop_lags() -> None:
    metrics = Metrics(of_one(EngineStats))
    watching = asyncio.create_task(metrics.loop.watch())
    await asyncio.sleep(0)
    time.sleep(0.77)  # as parsing a huge body would; ticks were due after 0.25, 0.5 and 0.75 s
    await asyncio.sleep(0.01)
    watching.cancel()
    found = samples(metrics)
    buckets = [("smolora_event_loop_lag_seconds_bucket", (("le", le),)) for le in ("0.25", "0.5", "1.0")]
    assert found["smolora_event_loop_lag_seconds_count", ()] == 3
    assert [found[bucket] for bucket in buckets] == [1, 2, 3]
    assert found["smolora_event_loop_lag_seconds_sum", ()] >= 0.52 + 0.27 + 0.02


@pytest.mark.anyio
async def test_a_very_long_stall_adds_a_bounded_number_of_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, loop = Metrics(of_one(EngineStats)), asyncio.get_running_loop()
    watching = asyncio.create_task(metrics.loop.watch())
    await asyncio.sleep(0)
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 1e6)  # the machine slept
    await asyncio.sleep(0.01)
    watching.cancel()
    assert samples(metrics)["smolora_event_loop_lag_seconds_count", ()] == 401


def test_use_of_quotas_is_read_once_a_minute_and_bounded() -> None:
    use = {(f"p{number}", "max_jobs"): number / 1000 for number in range(150)}
    reads: list[float] = []
    now = [0.0]

    def read() -> dict[tuple[str, str], float]:
        reads.append(now[0])
        if len(reads) == 2:
            raise OSError("the disk fails")
        return use

    metrics = Metrics(of_one(EngineStats))
    metrics.add(QuotaCollector(read, lambda: now[0]))

    def shares() -> dict[str, float]:
        found = samples(metrics).items()
        return {
            dict(labels)["project"]: value for (name, labels), value in found if name == "smolora_quota_used_ratio"
        }

    fullest = {f"p{number}": number / 1000 for number in range(50, 150)}
    for now[0] in (0.0, 1.0, 59.0):
        assert shares() == fullest
    now[0] = 60.0
    assert shares() == {}, "the rest of the metrics is needed most when a disk fails"
    now[0] = 120.0
    assert shares() == fullest
    assert reads == [0.0, 60.0, 120.0]


def test_requests_are_counted_by_outcome_and_adapter() -> None:
    metrics = Metrics(of_one(EngineStats))
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
    metrics = Metrics(of_one(EngineStats))
    for number in range(MAX_ADAPTER_LABELS + 50):
        metrics.accepted({f"adapter-{number}"})
    metrics.accepted({"adapter-0"})  # still under its own name
    found = samples(metrics)
    named = {labels: value for (name, labels), value in found.items() if name == "smolora_adapter_requests_total"}
    assert len(named) == MAX_ADAPTER_LABELS + 1
    assert named[(("adapter", "other"),)] == 50
    assert named[(("adapter", "adapter-0"),)] == 2


def test_servers_share_no_numbers() -> None:
    one, other = Metrics(of_one(EngineStats)), Metrics(of_one(EngineStats))
    one.refused()
    assert samples(other)["smolora_requests_total", (("outcome", "refused"),)] == 0


def test_outcomes_begin_at_zero() -> None:
    found = samples(Metrics(of_one(EngineStats)))
    outcomes = {dict(labels)["outcome"] for (name, labels) in found if name == "smolora_requests_total"}
    assert outcomes == {"completed", "cancelled", "failed", "refused", "invalid"}


def test_responses_are_counted_by_method_route_and_status() -> None:
    metrics = Metrics(of_one(EngineStats))
    for status, seconds in ((200, 0.02), (200, 0.2), (404, 0.001)):
        metrics.http.ended("GET", "/train/{job_id}", status, seconds)
    metrics.http.ended("BREW", "", 405, 0.001)
    found = samples(metrics)
    route = ("route", "/train/{job_id}")
    assert found["smolora_http_requests_total", (("method", "GET"), route, ("status", "200"))] == 2
    assert found["smolora_http_requests_total", (("method", "GET"), route, ("status", "404"))] == 1
    assert found["smolora_http_request_seconds_count", (route,)] == 3
    assert found["smolora_http_request_seconds_bucket", (("le", "0.025"), route)] == 2
    other = (("method", "other"), ("route", "other"), ("status", "405"))
    assert found["smolora_http_requests_total", other] == 1


def test_counters_are_rendered_a_tenth_of_the_time_and_gauges_always() -> None:
    now, current = [100.0], [EngineStats(num_running=1)]

    def clock() -> float:
        now[0] += 0.02  # time that each look takes for writing
        return now[0]

    metrics = Metrics(of_one(lambda: current[0]), clock=clock)
    refused = ("smolora_requests_total", (("outcome", "refused"),))
    assert samples(metrics)[refused] == 0
    metrics.refused()
    current[0] = EngineStats(num_running=2)
    found = samples(metrics)
    assert (found[refused], found["smolora_requests_running", ()]) == (0, 2)
    now[0] += 0.18
    assert samples(metrics)[refused] == 1


def test_counts_are_no_older_than_a_second() -> None:
    now = [100.0]

    def clock() -> float:
        now[0] += 5.0  # the writer was denied its core
        return now[0]

    metrics = Metrics(of_one(EngineStats), clock=clock)
    refused = ("smolora_requests_total", (("outcome", "refused"),))
    assert samples(metrics)[refused] == 0
    metrics.refused()
    now[0] += MAX_AGE - 5.0
    assert samples(metrics)[refused] == 1


def test_process_metrics_describe_this_process() -> None:
    found = samples(Metrics(of_one(EngineStats), [ServerCollector("tiny", lambda: False)]))
    assert found["process_resident_memory_bytes", ()] > 10 << 20
    assert abs(found["process_open_fds", ()] - len(os.listdir("/proc/self/fd"))) < 5
    assert found["process_threads", ()] >= threading.active_count()
    assert 0 < found["process_start_time_seconds", ()] < time.time()
    assert found["process_cpu_seconds_total", ()] > 0
    assert found["smolora_build_info", (("base", "tiny"), ("version", __version__))] == 1
    assert found["smolora_ready", ()] == 0
