"""Long JSON answers are compressed and have ETags; nothing is cached; HEAD answers like GET."""

import asyncio
import gzip
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Message

from server.api.representation import MIN_BYTES, compact, is_compactable
from server.api.zips import StoredZip
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import Caller
from tests.server.api.train_kit import submit

pytestmark = pytest.mark.anyio

PROMPT = {"prompt": "a", "max_tokens": 2}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Sent:
    """An answer as it is sent. httpx would decompress it."""

    status: int
    headers: Headers
    body: bytes


async def raw(app: FastAPI, method: str, path: str, body: object = None, **headers: str) -> Sent:
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    caller = Caller(app, path, body, method, [(b"host", b"localhost"), *given])
    await asyncio.wait_for(caller.task, 30)
    start, *bodies = caller.sent
    content = b"".join(message.get("body", b"") for message in bodies)
    return Sent(start["status"], Headers(raw=start["headers"]), content)


async def test_long_json_is_compressed_if_the_client_accepts_it(client: httpx.AsyncClient, app: FastAPI) -> None:
    plain = await raw(app, "GET", "/openapi.json", accept_encoding="identity")
    packed = await raw(app, "GET", "/openapi.json", accept_encoding="br, gzip;q=0.5")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) == int(packed.headers["content-length"]) < len(plain.body) / 3
    assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
    assert plain.headers["etag"] == packed.headers["etag"]
    refused = await raw(app, "GET", "/openapi.json", accept_encoding="gzip;q=0, br")
    assert refused.body == plain.body


async def test_metrics_are_compressed_if_the_client_accepts_it(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Prometheus and the page's Engine view do, which asks every two seconds."""
    packed = await raw(app, "GET", "/metrics", accept_encoding="gzip")
    plain = gzip.decompress(packed.body)
    assert b"smolora_requests_running" in plain
    assert len(packed.body) < len(plain) / 5


async def test_unchanged_answers_are_not_sent_again(client: httpx.AsyncClient, app: FastAPI) -> None:
    for name in ("a", "b"):
        await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))
    first = await raw(app, "GET", "/adapters")
    tag = first.headers["etag"]
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        again = await raw(app, "GET", "/adapters", if_none_match=known)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == tag
        assert not {"content-length", "content-type", "content-encoding"} & set(again.headers)
        assert "x-request-id" in again.headers
    assert (await raw(app, "GET", "/adapters", if_none_match='"other"')).body == first.body
    await client.delete("/adapters/b")
    await client.post("/adapters/c", files=as_parts(*peft_files()))
    changed = await raw(app, "GET", "/adapters", if_none_match=tag)
    assert changed.status == 200
    assert changed.headers["etag"] != tag


async def test_short_answers_errors_and_streams_are_sent_as_they_are(
    client: httpx.AsyncClient, app: FastAPI
) -> None:
    for method, path, body, status in (
        ("GET", "/health", None, 200),
        ("POST", "/generate", PROMPT, 200),
        ("POST", "/generate", PROMPT | {"stream": True, "max_tokens": 80}, 200),
        ("POST", "/v1/completions", PROMPT | {"model": "base", "stream": True, "max_tokens": 80}, 200),
        ("GET", "/nowhere", None, 404),
    ):
        sent = await raw(app, method, path, body, accept_encoding="gzip")
        assert sent.status == status
        assert not {"content-encoding", "etag", "vary"} & set(sent.headers), path
        is_stream = sent.headers["content-type"].startswith("text/event-stream")
        assert is_stream == (len(sent.body) >= MIN_BYTES), path


async def test_generations_have_no_etag(client: httpx.AsyncClient, app: FastAPI) -> None:
    body = PROMPT | {"max_tokens": 80, "logprobs": 5}
    sent = await raw(app, "POST", "/generate", body, accept_encoding="gzip")
    assert sent.headers["content-encoding"] == "gzip"
    assert "etag" not in sent.headers
    assert len(json.loads(gzip.decompress(sent.body))["choices"][0]["logprobs"]) == 80


@pytest.mark.parametrize(
    "path", ["/adapters", "/nowhere", "/v1/models", "/ready", "/openapi.json", "/metrics", "/docs"]
)
async def test_no_answer_is_stored(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).headers["cache-control"] == "no-store"


async def test_files_of_the_pages_stay_in_caches(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).headers["cache-control"] == "no-cache"
    asset = await client.get("/docs/assets/favicon.png")
    assert "etag" in asset.headers
    assert "cache-control" not in asset.headers


@pytest.mark.parametrize(
    "path", ["/adapters", "/v1/models", "/openapi.json", "/docs", "/", "/metrics", "/nowhere", "/ready"]
)
async def test_head_answers_like_get(client: httpx.AsyncClient, path: str) -> None:
    get, head = await client.get(path), await client.head(path)
    assert head.status_code == get.status_code
    changing = {"x-request-id", "content-length"} if path == "/metrics" else {"x-request-id"}
    assert {**head.headers, **dict.fromkeys(changing, "")} == {**get.headers, **dict.fromkeys(changing, "")}


async def test_head_ends_a_download_at_once(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[StoredZip] = []
    close = StoredZip.close

    def noted(archive: StoredZip) -> None:
        closed.append(archive)
        close(archive)

    monkeypatch.setattr(StoredZip, "close", noted)
    await client.post("/adapters/a", files=as_parts(*peft_files()))
    path = "/adapters/a/1/download"
    get, head = await raw(app, "GET", path), await raw(app, "HEAD", path)
    assert (head.status, head.body) == (get.status, b"")
    assert int(head.headers["content-length"]) == len(get.body)
    assert len(closed) == 2


async def test_head_ends_an_endless_stream_at_once(client: httpx.AsyncClient, app: FastAPI) -> None:
    path = f"/train/{await submit(client)}/events"
    head = await raw(app, "HEAD", path, accept="text/event-stream")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert app.state.services.feeds._feeds == {}, "nobody follows the job"


@pytest.mark.parametrize("path", ["/generate", "/adapters/a/aliases/b"])
async def test_head_is_not_possible_without_get(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 405


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-type": "application/json", "content-length": "1024"}, True),
        ({"content-type": "application/problem+json", "content-length": "5000"}, True),
        ({"content-type": "application/json", "content-length": "1023"}, False),
        ({"content-type": "application/json"}, False),
        ({"content-type": "application/zip", "content-length": "5000"}, False),
        ({"content-type": "text/event-stream"}, False),
        ({"content-type": "application/json", "content-length": "5000", "content-encoding": "br"}, False),
    ],
)
def test_what_counts_as_long_json(headers: dict[str, str], expected: bool) -> None:
    assert is_compactable(Headers(headers)) == expected


async def test_large_answers_are_hashed_and_compressed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would stop everything else for tens of milliseconds."""
    threads: list[threading.Thread] = []

    def noting(work: Callable[P, T]) -> Callable[P, T]:
        def noted(*arguments: P.args, **options: P.kwargs) -> T:
            threads.append(threading.current_thread())
            return work(*arguments, **options)

        return noted

    monkeypatch.setattr(hashlib, "sha256", noting(hashlib.sha256))
    monkeypatch.setattr(gzip, "compress", noting(gzip.compress))
    content = json.dumps([{"name": f"n{number}", "digest": number**7} for number in range(20_000)]).encode()
    length = [(b"content-length", b"%d" % len(content))]
    start: Message = {"type": "http.response.start", "status": 200, "headers": length}
    body: Message = {"type": "http.response.body", "body": content}
    await compact(Headers({"accept-encoding": "gzip"}), "GET", start, body)
    assert gzip.decompress(body["body"]) == content
    assert len(threads) == 2
    assert threads[0] is threads[1] is not threading.current_thread()


async def test_a_failure_while_an_answer_is_compressed_is_an_ordinary_one(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(gzip, "compress", fail)
    sent = await raw(app, "GET", "/openapi.json", accept_encoding="gzip")
    assert (sent.status, json.loads(sent.body)["status"]) == (500, 500)
    assert not {"content-encoding", "etag"} & set(sent.headers)
