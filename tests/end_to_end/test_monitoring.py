"""A real Prometheus scrapes a real server under load: every query of the dashboard and every alert has series."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.prometheus_process import Prometheus, needs_prometheus
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows, submit, succeeded, wait_until
from tests.kits.monitoring import alerts, queries

pytestmark = [pytest.mark.thorough, needs_prometheus]
OPERATOR = "operators-0123456789"
LOAD_SECONDS = 10.0


@contextmanager
def loaded(server: ServerProcess) -> Iterator[None]:
    """Let clients send various requests during the block."""
    ended = threading.Event()

    def repeat(work: Callable[[], object]) -> None:
        while not ended.is_set():
            work()
            time.sleep(0.05)

    def streamed() -> None:
        with server.stream("HTTP 404:", max_tokens=8, ignore_eos=True) as events:
            list(events)

    works: list[Callable[[], object]] = [
        lambda: server.text("HTTP 200:", adapter="codes", max_tokens=8, ignore_eos=True),
        streamed,
        lambda: server.client.get("/train"),
        lambda: server.client.get("/adapters/nobody"),
    ]
    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(repeat, work) for work in works]
        try:
            yield
        finally:
            ended.set()
            for future in running:
                future.result()


@pytest.fixture(scope="module")
def server(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("home")
    server = ServerProcess(home, OPERATOR, model=converted_tiny, workers=1, api_keys=OPERATOR)
    yield server
    server.close()


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Start a Prometheus; return it once the server has trained, published and generated for a while."""
    made = server.client.post("/keys", json={"name": "prometheus", "scopes": ["metrics"]})
    assert made.status_code == 201, made.text
    assert server.client.put("/projects/acme", json={"max_jobs": 5}).status_code == 200
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), made.json()["secret"])
    try:
        prometheus.scrape(server)
        succeeded(server, submit(server, name="codes", data=code_rows(8), training={"max_steps": 2}))
        with loaded(server):
            submit(server, name="more", data=code_rows(9), training={"max_steps": 2})
            time.sleep(LOAD_SECONDS)
            prometheus.moment = time.time()  # however long the tests take
        yield prometheus
    finally:
        prometheus.close()


@pytest.mark.parametrize("query", dict.fromkeys(query for _, query in queries()))
def test_every_query_of_the_dashboard_has_series(query: str, prometheus: Prometheus) -> None:
    if "changes(" in query:  # an annotation's: its condition is a start a minute ago
        query = query.partition(" > ")[0]
    values = prometheus.values(query)
    assert values
    assert not all(map(math.isnan, values)), query


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_every_alert_has_series_and_is_quiet(alert: Any, prometheus: Prometheus) -> None:
    assert alert.measures()
    for measured in alert.measures():
        values = prometheus.values(measured)
        assert values, measured
        assert not any(map(math.isnan, values)), measured
    assert prometheus.state_of(alert.name) != "firing"


def test_prometheus_has_the_servers_numbers(server: ServerProcess, prometheus: Prometheus) -> None:
    (generated,) = prometheus.values("sum(rate(smolora_generated_tokens_total[10s]))")
    assert generated > 0
    routes = {
        sample["metric"]["route"]
        for sample in prometheus.get("query", query="smolora_http_request_seconds_count")["result"]
    }
    assert {"/generate", "/train", "/train/{job_id}", "/adapters/{name}", "/metrics"} <= routes
    assert prometheus.values('smolora_jobs{status="succeeded"}')[0] >= 1
    assert sum(prometheus.values("smolora_workers")) == 1
    assert prometheus.values("process_threads")[0] > 1


def test_gateway_metrics_list_resident_adapters(server: ServerProcess, prometheus: Prometheus) -> None:
    server.text("HTTP 200:", adapter="codes", max_tokens=2)
    samples = [line for line in server.metrics() if line.startswith("vllm:lora_requests_info")]
    assert len(samples) == 1
    assert 'running_lora_adapters="codes,codes@1"' in samples[0]
    assert 'waiting_lora_adapters=""' in samples[0]
    series = prometheus.get("query", query='{__name__="vllm:lora_requests_info"}')["result"]
    assert not series, "each change of its labels would be a new series"


def test_dead_server_raises_an_alert(server: ServerProcess, prometheus: Prometheus) -> None:
    """This test is last, as it kills the server."""
    server.kill()
    wait_until(lambda: prometheus.state_of("SmoloraDown") in ("pending", "firing"), what="the alert")
