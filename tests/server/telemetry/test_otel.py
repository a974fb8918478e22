"""Spans of the SDK: their parents, its variables, and missing packages."""

import logging
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.config.environment import trace_exporters
from server.telemetry.otel import OtelTracer, exporter_of
from server.telemetry.spans import open_tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def tracer() -> tuple[OtelTracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return OtelTracer([], [SimpleSpanProcessor(exporter)]), exporter


def test_request_continues_its_clients_trace() -> None:
    mine, exporter = tracer()
    span = mine.request({"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert span is not None
    assert span.trace_id == TRACE
    span.child("queue", 1_000, {"smolora.tokens": 3}).end(2_000)
    span.end(attributes={"name": "GET /adapters", "http.response.status_code": 500}, error="500")
    child, above = exporter.get_finished_spans()
    assert above.parent is not None
    assert f"{above.parent.span_id:016x}" == PARENT
    assert (above.name, above.kind, above.status.status_code) == (
        "GET /adapters",
        SpanKind.SERVER,
        StatusCode.ERROR,
    )
    assert above.attributes == {"http.response.status_code": 500, "error.type": "500"}
    assert child.parent is not None
    assert child.parent.span_id == above.context.span_id
    assert (child.name, child.start_time, child.end_time, child.attributes) == (
        "queue",
        1_000,
        2_000,
        {"smolora.tokens": 3},
    )


@pytest.mark.parametrize("given", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}"])
def test_an_invalid_header_begins_a_new_trace(given: str) -> None:
    span = tracer()[0].request({"traceparent": given})
    assert span is not None
    assert span.trace_id != TRACE
    assert len(span.trace_id) == 32


@pytest.mark.parametrize(
    "headers",
    [
        {"baggage": "xyzzy of mine"},
        {"baggage": "xyzzy \x9b31m\xe9=1"},
        {"baggage": f"xyzzy={'x' * 9000}"},
        {"baggage": f"xyzzy={'x' * 5000},b=1"},
        {"tracestate": "xyzzy of mine"},
        {"tracestate": "xyzzy=1,xyzzy=2"},
        {"tracestate": ",".join(f"xyzzy{number}=1" for number in range(40))},
    ],
)
def test_clients_headers_are_not_logged(headers: dict[str, str]) -> None:
    """Not of any client: spans begin before the key is checked."""
    code = f"""
from server.telemetry import logs
from server.telemetry.otel import OtelTracer
logs.set_up()
assert OtelTracer([]).request({{"traceparent": "00-{TRACE}-{PARENT}-01", **{headers!r}}}).trace_id == "{TRACE}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stderr == ""


def test_a_collectors_key_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization: Bearer xyzzy")
    code = "from server.telemetry.spans import open_tracer; assert open_tracer()"  # before logging is set up
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "OTEL_EXPORTER_OTLP_HEADERS: entries that aren't name=value are ignored" in done.stderr
    assert "xyzzy" not in done.stderr


def test_unsampled_requests_have_no_span() -> None:
    assert tracer()[0].request({"traceparent": f"00-{TRACE}-{PARENT}-00"}) is None


def test_work_has_its_own_trace_with_a_link_to_its_cause() -> None:
    mine, exporter = tracer()
    for because_of in (f"00-{TRACE}-{PARENT}-01", None, "nonsense"):
        span = mine.work("train tweets", {"smolora.job.id": "job-1"}, because_of)
        assert span is not None
        span.end()
    linked, *others = exporter.get_finished_spans()
    assert linked.parent is None
    assert f"{linked.context.trace_id:032x}" != TRACE
    assert [f"{link.context.trace_id:032x}" for link in linked.links] == [TRACE]
    assert all(not other.links for other in others)


def test_a_traceparent_names_its_span() -> None:
    mine, _ = tracer()
    span = mine.request({})
    assert span is not None
    assert span.traceparent.split("-")[:2] == ["00", span.trace_id]
    below = mine.request({"traceparent": span.traceparent})
    assert below is not None
    assert below.trace_id == span.trace_id


def test_standard_variables_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def resource() -> dict[str, object]:
        mine, exporter = tracer()
        span = mine.request({})
        assert span is not None
        span.end()
        return dict(exporter.get_finished_spans()[0].resource.attributes)

    assert resource()["service.name"] == "smolora"
    assert resource()["service.version"]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    assert resource()["service.name"] == "mine"
    assert resource()["deployment.environment.name"] == "test"


def test_standard_variables_choose_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    assert tracer()[0].request({}) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ()),
        ({ENDPOINT: "http://127.0.0.1:4318"}, ("otlp_proto_http",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, ("otlp_proto_http",)),
        ({ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ("otlp_proto_http", "console")),
        ({ENDPOINT: "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({ENDPOINT: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, ()),
    ],
)
def test_standard_variables_choose_exporters(
    variables: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert trace_exporters() == expected


def test_a_missing_exporter_is_logged_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LookupError, match="opentelemetry-exporter-otlp-proto-grpc"):
        exporter_of("otlp_proto_grpc")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with caplog.at_level(logging.WARNING):
        assert open_tracer() is None
    assert "no exporter zipkin is installed" in caplog.text


def test_a_hanging_collector_does_not_delay_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    code = """
import time
from server.telemetry.spans import open_tracer
tracer = open_tracer()
tracer.request({}).end()
began = time.monotonic()
tracer.close()
print(time.monotonic() - began)
"""
    assert float(in_new_process(code)) < 5


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    return done.stdout


MODULES = "server.cli.main, server.api.app, server.serve.startup, server.serve.process, server.jobs.run_job"
LOADED = """
import sys
parts = "opentelemetry.sdk", "opentelemetry.exporter", "google."
found = [name for name in sys.modules if name.startswith(parts)]
print(found, "server.telemetry.otel" in sys.modules, tracer)
"""


def test_opentelemetry_is_not_imported_by_default() -> None:
    """Neither the SDK, nor the exporters, nor protobuf. FastAPI imports the API, which does nothing alone."""
    code = f"import {MODULES}; from server.telemetry.spans import open_tracer; tracer = open_tracer()\n{LOADED}"
    assert in_new_process(code) == "[] False None\n"


def test_a_server_without_the_extra_logs_it_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    code = """
import logging, sys
sys.modules["opentelemetry.sdk"] = None
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from server.telemetry.spans import open_tracer
assert open_tracer() is None
"""
    assert "pip install -e '.[otel]'" in in_new_process(code)
