"""A request's spans: its phases as children, conventional names, and no text."""

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.engine.request import GenerationRequest, SequenceOutput, Timing
from server.errors import GenerationFailed
from server.telemetry.otel import OtelTracer
from tests.server.api.access.key_kit import client_with, new_secret
from tests.server.api.adapters.test_aliases import upload
from tests.server.api.fakes import Caller, FakeEngine, FakeStream, failing, until, words
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio
TRACE = "0af7651916cd43dd8448eb211c80319c"
SECRET = "xyzzy"


@dataclass
class Traced:
    app: FastAPI
    exporter: InMemorySpanExporter

    def spans(self) -> dict[str, ReadableSpan]:
        """Return spans by name."""
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def paths(self) -> list[str]:
        """Return each span's names from the root on."""
        found = {span.context.span_id: span for span in self.exporter.get_finished_spans()}

        def path(span: ReadableSpan) -> str:
            above = found.get(span.parent.span_id) if span.parent is not None else None
            return span.name if above is None else f"{path(above)} > {span.name}"

        return sorted(map(path, found.values()))


@pytest.fixture
def traced(make_services: MakeServices) -> Traced:
    exporter = InMemorySpanExporter()
    tracer = OtelTracer([], [SimpleSpanProcessor(exporter)])
    return Traced(new_app(replace(make_services(), tracer=tracer)), exporter)


@pytest.fixture
async def client(traced: Traced) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(traced.app) as client:
        yield client


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    assert span.attributes is not None
    return dict(span.attributes)


def cold(request: GenerationRequest) -> Iterable[SequenceOutput]:
    """Yield words of an engine that had to load an adapter first."""
    for output in words(request):
        timing = Timing(queue=0.5, first_token=0.75, total=2.0, load=(0.125, 0.375))
        yield replace(output, timing=timing if output.finish_reason else None, num_cached_tokens=1)


async def test_span_begins_before_the_engines_phases(
    client: httpx.AsyncClient, traced: Traced, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it began later, the engine's phases would end after the request."""
    submit, moments = engine.submit, list[int]()

    def noting(request: GenerationRequest) -> FakeStream:
        moments.append(time.time_ns())
        return submit(request)

    monkeypatch.setattr(engine, "submit", noting)
    assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 2})).status_code == 200
    started = traced.spans()["text_completion tiny-llama"].start_time
    assert started is not None
    assert started <= moments[0]


async def test_a_chats_phases_are_beneath_it(
    client: httpx.AsyncClient, traced: Traced, engine: FakeEngine
) -> None:
    await upload(client, "tweets", 0)
    traced.exporter.clear()
    engine.script = cold
    body = {
        "model": "tweets",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0.5,
        "seed": 7,
        "presence_penalty": 0.25,
    }
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    root = "POST /v1/chat/completions"
    chat = f"{root} > chat tweets@1"
    assert traced.paths() == [
        root,
        chat,
        f"{chat} > decode",
        f"{chat} > prefill",
        f"{chat} > queue",
        f"{chat} > queue > load adapters",
    ]
    spans = traced.spans()
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert attributes(spans[root]) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/chat/completions",
        "client.address": "127.0.0.1",
        "smolora.request.id": response.headers["x-request-id"],
        "smolora.key.id": "anonymous",
        "smolora.project": "default",
    }
    assert attributes(spans["chat tweets@1"]) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "smolora",
        "gen_ai.request.model": "tweets@1",
        "gen_ai.response.model": "tweets@1",
        "gen_ai.response.id": engine.requests[0].request_id,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.usage.input_tokens": len(engine.requests[0].prompt_token_ids),
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ("length",),
        "smolora.base": "tiny-llama",
        "smolora.outcome": "completed",
    }
    start = spans["queue"].start_time
    assert start is not None
    times = {name: (_after(start, span.start_time), _after(start, span.end_time)) for name, span in spans.items()}
    assert times["queue"] == (0.0, 0.5)
    assert times["load adapters"] == (0.125, 0.375)
    assert times["prefill"] == (0.5, 0.75)
    assert times["decode"] == (0.75, 2.0)
    assert attributes(spans["decode"]) == {"smolora.tokens": 8}


def _after(start: int, time: int | None) -> float:
    assert time is not None
    return (time - start) / 1e9


async def test_each_prompt_and_expression_is_a_generation(client: httpx.AsyncClient, traced: Traced) -> None:
    await client.post("/v1/completions", json={"model": "tiny-llama", "prompt": ["a", "b", "c"], "n": 2})
    names = [span.name for span in traced.exporter.get_finished_spans()]
    assert names.count("text_completion tiny-llama") == 3
    assert attributes(traced.spans()["text_completion tiny-llama"])["gen_ai.request.choice.count"] == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_is_an_error(
    client: httpx.AsyncClient, traced: Traced, engine: FakeEngine, stream: bool
) -> None:
    engine.script = failing(2, GenerationFailed("it failed"))
    await client.post("/generate", json={"prompt": "hi", "stream": stream})
    spans = traced.spans()
    failed = attributes(spans["text_completion tiny-llama"])
    assert (failed["error.type"], failed["smolora.outcome"]) == ("generation_failed", "failed")
    assert ("error.type" in attributes(spans["POST /generate"])) == (not stream), "a stream has begun with 200"


async def test_a_client_that_leaves_is_no_error(traced: Traced, engine: FakeEngine) -> None:
    engine.hold_after = 2
    caller = Caller(traced.app, "/generate", {"prompt": "hi", "max_tokens": 9, "stream": True})
    await until(lambda: len(caller.sent) > 2)
    caller.hang_up()
    await caller.task
    spans = traced.spans()
    assert attributes(spans["text_completion tiny-llama"])["smolora.outcome"] == "cancelled"
    assert "error.type" not in attributes(spans["text_completion tiny-llama"])
    assert {"prefill", "decode"} <= set(spans)


async def test_refusals_have_a_route_and_nothing_beneath(traced: Traced) -> None:
    secret = new_secret(traced.app, "acme", scopes=["generate"])
    async with client_with(traced.app, secret) as client:
        await client.get("/train/job-1")
        await client.get("/made-up/path", headers={"Authorization": "Bearer wrong"})
    assert traced.paths() == ["GET", "GET /train/{job_id}"]
    found = attributes(traced.spans()["GET"])
    assert found["http.response.status_code"] == 401
    assert "http.route" not in found
    assert secret not in str([span.to_json() for span in traced.exporter.get_finished_spans()])


async def test_methods_that_http_does_not_define_have_its_name(client: httpx.AsyncClient, traced: Traced) -> None:
    await client.request("BREW", "/adapters")
    await client.request(f"BREW{'W' * 100}", "/made-up")
    assert traced.paths() == ["HTTP", "HTTP /adapters"]
    brewed, longer = (attributes(span) for span in traced.exporter.get_finished_spans())
    assert (brewed["http.request.method"], brewed["http.request.method_original"]) == ("_OTHER", "BREW")
    assert len(str(longer["http.request.method_original"])) == 32


async def test_probes_and_scrapes_are_not_traced(client: httpx.AsyncClient, traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert not traced.exporter.get_finished_spans()


def echo(request: GenerationRequest) -> Iterable[SequenceOutput]:
    for output in words(request):
        yield replace(output, text=f"{SECRET} ")


async def test_spans_contain_no_text_of_clients(
    client: httpx.AsyncClient, traced: Traced, engine: FakeEngine
) -> None:
    turns = [{"role": "user", "content": SECRET}]
    bodies: Sequence[tuple[str, Mapping[str, object]]] = [
        ("/generate", {"prompt": SECRET, "stop": [f"{SECRET}!"]}),
        ("/generate", {"messages": turns, "regex": f"({SECRET}|b)"}),
        ("/generate", {"prompt": SECRET, SECRET: 1}),
        ("/v1/chat/completions", {"model": "tiny-llama", "messages": turns, "user": SECRET}),
        ("/v1/completions", {"model": "tiny-llama", "prompt": SECRET}),
    ]
    for path, body in bodies:
        for engine.script in (echo, failing(1, GenerationFailed("it failed"))):
            await client.post(path, json=body)

    def broken(request: GenerationRequest) -> Iterable[SequenceOutput]:
        raise KeyError(SECRET)

    engine.script = broken
    assert (await client.post("/generate", json={"prompt": SECRET})).status_code == 500
    spans = traced.exporter.get_finished_spans()
    assert len([span for span in spans if span.name.startswith("POST")]) == 11
    assert not [span for span in spans if SECRET in span.to_json()]


async def test_lines_of_the_log_have_the_trace(
    client: httpx.AsyncClient, traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "smolora.api"):
        await client.get("/adapters", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    assert f" trace={TRACE} " in caplog.text
