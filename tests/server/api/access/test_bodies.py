"""Bodies that stall."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from starlette.types import Message

from server.api.bodies import _DRAIN_SECONDS
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio
JSON = {"Content-Type": "application/json"}
PART = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture
async def hasty(make_services: MakeServices) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(new_app(make_services(body_timeout=0.2, api_keys="operators-0123456789"))) as client:
        client.headers["Authorization"] = "Bearer operators-0123456789"
        yield client


async def pieces(piece: bytes, num: int, every: float, first: bytes = b"") -> AsyncIterator[bytes]:
    yield first
    for _ in range(num):
        yield piece
        await asyncio.sleep(every)


class Endless(httpx.AsyncByteStream):
    """A body of one byte now and then. Unlike a generator, it can be awaited again after a cancelled wait, like a
    socket."""

    def __init__(self, every: float, first: bytes) -> None:
        self._every = every
        self._first: bytes | None = first

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if (first := self._first) is not None:
            self._first = None
            return first
        await asyncio.sleep(self._every)
        return b" "


async def undrained(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], every: float, first: bytes = b""
) -> httpx.Response:
    """Return the answer to an endless body, sent before the drain ends; a busy machine gets three tries."""
    for _ in range(3):
        request = client.build_request("POST", path, headers=headers)
        del request.headers["content-length"]
        request.stream = Endless(every, first)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS - 2):
                return await client.send(request)
    raise AssertionError("it was waited for")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/generate", JSON),
        ("/v1/completions", JSON),
        ("/train", JSON),
        ("/adapters/a", MULTIPART),
        ("/datasets", MULTIPART),
        ("/v1/files", MULTIPART),
        ("/nowhere", JSON),
    ],
)
@pytest.mark.parametrize("every", [0.01, 60])
async def test_body_without_progress_times_out(
    path: str, headers: dict[str, str], every: float, hasty: httpx.AsyncClient
) -> None:
    """A byte now and then is no progress."""
    first = (
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' if headers is MULTIPART else b""
    )
    response = await undrained(hasty, path, headers, every, first)
    if path == "/nowhere":
        assert response.status_code == 404
        return
    assert response.status_code == 408
    assert "SMOLORA_BODY_TIMEOUT" in response.text
    assert response.headers["x-request-id"]


async def test_requests_without_keys_do_not_wait(make_services: MakeServices) -> None:
    services = make_services(body_timeout=0.2, api_keys="operators-0123456789")
    async with client_of(new_app(services)) as client:
        response = await undrained(client, "/generate", JSON, 60)
    assert response.status_code == 408


async def test_a_large_body_may_take_longer_in_all(make_services: MakeServices) -> None:
    content = pieces(b" " * (16 << 10), 8, 0.5)
    async with client_of(new_app(make_services(body_timeout=3.0))) as client:
        response = await client.post("/generate", content=content, headers=JSON)
    assert response.status_code == 422


async def test_a_client_that_waits_for_its_answer_sends_nothing(make_services: MakeServices) -> None:
    """The timeout ends with the body."""
    app = new_app(make_services(body_timeout=0.05))
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": b'{"prompt": "a", "max_tokens": 1}', "more_body": False})
    sent: list[Message] = []
    services = app.state.services
    services.engine.hold_after = 0

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "query_string": b""}
    task = asyncio.create_task(app(scope, inbox.get, send))
    await asyncio.sleep(0.3)
    services.engine.held.set()
    await task
    assert sent[0]["status"] == 200
