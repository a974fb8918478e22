"""The log line of each request: client, adapters and amounts, but never any text of a client."""

import json
import logging
from collections.abc import Iterable, Mapping

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from adapters.library import Library
from server.engine.request import GenerationRequest, SequenceOutput
from server.errors import GenerationFailed
from server.telemetry.logs import Fields, JsonFormatter, LineFormatter
from tests.server.api.access.key_kit import client_with, new_secret
from tests.server.api.adapters.test_aliases import upload
from tests.server.api.fakes import Caller, FakeEngine, failing, http_scope, scoring, until, words
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

SECRET = "xyzzy"
"""Text that clients send and the engine answers, everywhere."""


def lines(caplog: pytest.LogCaptureFixture) -> list[Mapping[str, object]]:
    """Return the fields of each request's line."""
    found = [record.msg for record in caplog.records if record.name == "smolora.api"]
    return [message.values for message in found if isinstance(message, Fields)]


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def test_each_request_except_probes_has_one_line(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post("/generate?key=secret", json={"prompt": "my own words"})
    await client.get("/adapters/a%0Ab%20status=500")
    await client.get("/health")
    await client.get("/metrics")
    texts = [record.getMessage() for record in caplog.records if record.name == "smolora.api"]
    assert len(texts) == 2
    assert texts[0].startswith("method=POST path=/generate status=422 ms=")
    assert texts[1].startswith("method=GET path=/adapters/a\\nb\\x20status=500 status=404 ms=")
    assert texts[0].endswith(" client=127.0.0.1")
    assert "secret" not in texts[0]
    assert "words" not in texts[0]


async def test_line_has_the_generations_amounts(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, library: Library
) -> None:
    await upload(client, "tweets", 0)
    await upload(client, "news", 1)
    caplog.clear()
    body = {"prompt": "hi", "adapter": "tweets*0.5+news", "max_tokens": 3, "n": 2}
    answer = (await client.post("/generate", json=body)).json()
    (line,) = lines(caplog)
    fields = {key: value for key, value in line.items() if key not in ("ms", "client", "method", "path", "status")}
    assert fields == {
        "key": "anonymous",
        "project": "default",
        "generation": answer["id"],
        "adapters": "tweets@1,news@1",
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "completion_tokens": 6,
        "cached_tokens": 0,
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "hi"}),
        ("/v1/completions", {"model": "tiny-llama", "prompt": ["hi", "ho"]}),
        ("/v1/chat/completions", {"model": "tiny-llama", "messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_streams_and_answers_say_the_same(
    path: str,
    body: Mapping[str, object],
    stream: bool,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    response = await client.post(path, json={**body, "stream": stream, "max_tokens": 4})
    assert response.status_code == 200, response.text
    (line,) = lines(caplog)
    assert line["generation"] == ",".join(request.request_id for request in engine.requests)
    assert line["completion_tokens"] == 4 * len(engine.requests)
    assert line["adapters"] == "base"


async def test_line_of_a_comparison_sums_its_answers(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    await upload(client, "tweets", 0)
    caplog.clear()
    await client.post(
        "/compare", json={"prompt": "hi", "adapters": ["tweets", "base"] * 8, "max_tokens": 1, "n": 2}
    )
    (line,) = lines(caplog)
    assert line["adapters"] == "tweets@1"
    assert line["completion_tokens"] == 32
    assert str(line["generation"]).count("gen-") == 16


async def test_aborted_answers_count_their_tokens(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.hold_after = 2
    caller = Caller(app, "/generate", {"prompt": "hi", "max_tokens": 9, "stream": True})
    await until(lambda: len(caller.sent) > 2)
    caller.hang_up()
    await caller.task
    (line,) = lines(caplog)
    assert line["completion_tokens"] == 2
    assert line["generation"] == engine.requests[0].request_id


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/datasets", "/v1/files", "/adapters/a"])
async def test_disconnect_within_a_body_is_no_error(
    app: FastAPI, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is neither the server's fault, which would raise an alert, nor the body's."""
    is_form = path in ("/datasets", "/v1/files", "/adapters/a")
    kind = b"multipart/form-data; boundary=x" if is_form else b"application/json"
    first = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\na' if is_form else b"{"
    gone: Message = {"type": "http.disconnect"}
    inbox = iter([{"type": "http.request", "body": first, "more_body": True}, *[gone] * 9])

    async def receive() -> Message:
        return next(inbox)

    async def send(message: Message) -> None:
        """Discard the message."""

    headers = [(b"content-type", kind), (b"content-length", b"1000")]
    await app(http_scope("POST", path, headers), receive, send)
    (line,) = lines(caplog)
    assert line["status"] == 499
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_keys_and_projects_are_named_and_secrets_are_not(
    make_services: MakeServices, caplog: pytest.LogCaptureFixture
) -> None:
    app = new_app(make_services())
    secret = new_secret(app, "acme")
    async with client_with(app, secret) as client, client_of(app) as stranger:
        await client.get("/adapters")
        await stranger.get("/adapters", headers={"Authorization": "Bearer guessed-wrong"})
    known, unknown = lines(caplog)
    assert (str(known["key"])[:4], known["project"]) == ("key-", "acme")
    assert "key" not in unknown
    assert unknown["status"] == 401
    assert secret not in caplog.text
    assert "guessed-wrong" not in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", {"prompt": "hi"}), ("/v1/completions", {"model": "tiny-llama", "prompt": "hi"})],
)
async def test_place_of_an_error_is_logged_for_streams_too(
    path: str,
    body: Mapping[str, object],
    client: httpx.AsyncClient,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(request: GenerationRequest) -> Iterable[SequenceOutput]:
        yield from list(words(request))[:2]
        raise KeyError(SECRET)

    engine.script = broken
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert error.startswith(f"KeyError at {__file__}:")
    assert SECRET not in error


def echo(request: GenerationRequest) -> Iterable[SequenceOutput]:
    """Yield an answer that contains the secret."""
    for output in words(request):
        yield SequenceOutput(**{**vars(output), "text": f"{SECRET} "})


async def test_log_contains_no_text_of_clients(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither prompts, answers, stop strings, schemas and rows, nor the refusals of these, in either format."""
    turns = [{"role": "user", "content": SECRET}]
    engine.script = echo
    for stream in (True, False):
        for path, body in (
            ("/generate", {"prompt": SECRET, "stop": [f"{SECRET}!"]}),
            ("/generate", {"messages": turns, "logprobs": 2}),
            ("/generate", {"prompt": SECRET, "regex": f"{SECRET}+("}),
            ("/generate", {"prompt": SECRET, "max_tokens": SECRET}),
            ("/generate", {"prompt": SECRET, SECRET: 1}),
            ("/v1/chat/completions", {"model": "tiny-llama", "messages": turns}),
            ("/v1/completions", {"model": "tiny-llama", "prompt": SECRET}),
        ):
            await client.post(path, json={**body, "stream": stream})
        engine.script = failing(2, GenerationFailed("it failed"))
        await client.post("/generate", json={"prompt": SECRET, "stream": stream})
        engine.script = echo
    engine.script = scoring
    await client.post("/compare", json={"prompt": SECRET, "adapters": ["base"], "score": [SECRET]})
    await client.post("/tokenize", json={"prompt": SECRET, "return_token_strs": True})
    await client.post(
        "/train", json={"name": "t", "data": [{"prompt": SECRET, "completion": SECRET}, {SECRET: 1}]}
    )
    await client.post("/train", json={"name": "t", "data": [{"prompt": SECRET, "completion": SECRET}] * 8})
    await client.post("/datasets", files={"file": ("rows.jsonl", f'{{"prompt": "{SECRET}"\n'.encode())})
    await client.post(
        "/generate", content=f'{{"prompt": "{SECRET}'.encode(), headers={"Content-Type": "application/json"}
    )

    def broken(request: GenerationRequest) -> Iterable[SequenceOutput]:
        raise KeyError(SECRET)

    engine.script = broken
    assert (await client.post("/generate", json={"prompt": SECRET})).status_code == 500
    assert len(lines(caplog)) == 23
    for formatter in (LineFormatter(), JsonFormatter()):
        texts = [formatter.format(record) for record in caplog.records if not record.name.startswith("httpx")]
        assert not [text for text in texts if SECRET in text]
    json.loads(JsonFormatter().format(caplog.records[-1]))
