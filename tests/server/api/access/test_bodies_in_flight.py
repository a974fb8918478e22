"""How much memory the bodies of requests may take together."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from server.api.access import bodies
from server.api.access.bodies import SMALL_BODY_BYTES, BytesInFlight
from server.api.app import ROUTES
from server.api.middleware import BodyLimit
from server.errors import QueueFull
from server.metrics.lanes import LaneMetrics
from tests.server.api.fakes import until

pytestmark = pytest.mark.anyio

KIB = 1 << 10


def test_a_project_holds_three_quarters_at_most_and_gives_all_back() -> None:
    in_flight = BytesInFlight(1024 * KIB)
    with ExitStack() as stack:
        greedy = [stack.enter_context(in_flight.held("greedy")) for _ in range(4)]
        for add in greedy[:3]:
            add(256 * KIB)
        with pytest.raises(QueueFull, match="too many large bodies") as caught:
            greedy[3](SMALL_BODY_BYTES + 1)
        assert caught.value.retry_after > 1
        modest = stack.enter_context(in_flight.held("modest"))
        modest(256 * KIB)
        with pytest.raises(QueueFull):
            modest(1)
        assert in_flight.num_bytes == 1024 * KIB
    assert in_flight.num_bytes == 0


def test_a_small_body_is_never_refused() -> None:
    in_flight = BytesInFlight(128 * KIB)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(in_flight.held("any"))(SMALL_BODY_BYTES)
        assert in_flight.num_bytes == 10 * SMALL_BODY_BYTES
        add = stack.enter_context(in_flight.held("any"))
        add(SMALL_BODY_BYTES)
        with pytest.raises(QueueFull):
            add(1)


def test_memory_is_returned_to_the_system_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = threading.Semaphore(0)
    monkeypatch.setattr(bodies, "return_freed_memory", returned.release)
    in_flight = BytesInFlight(1024 * KIB)
    for _ in range(9):
        with in_flight.held("any") as add:  # nothing of the kind
            add(256 * KIB)
    assert not returned.acquire(blocking=False)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(in_flight.held("any"))(256 * KIB)
        assert not returned.acquire(blocking=False)
    assert returned.acquire(timeout=60)
    assert not returned.acquire(timeout=0.01)  # once


async def test_half_sent_bodies_are_bounded_and_what_is_beyond_is_429() -> None:
    registry = CollectorRegistry()
    in_flight = BytesInFlight(500 * KIB, LaneMetrics(registry))

    async def read(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    routes = [Route(path, read, methods=["POST"]) for path in ("/generate", "/datasets")]
    app = BodyLimit(Starlette(routes=routes), ROUTES, in_flight)
    go = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"a" * 100 * KIB
        await go.wait()
        yield b"a"

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        tasks = [asyncio.create_task(client.post("/generate", content=half())) for _ in range(3)]
        await until(lambda: in_flight.num_bytes == 300 * KIB)
        refused = await client.post("/generate", content=b"a" * 100 * KIB)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert registry.get_sample_value("smolora_refused_total", {"reason": "bodies"}) == 1
        assert (await client.post("/generate", content=b"a")).text == "1"
        upload = await client.post("/datasets", content=b"a" * 100 * KIB)  # is spooled to disk
        assert upload.text == str(100 * KIB)
        go.set()
        assert [(await task).text for task in tasks] == [str(100 * KIB + 1)] * 3
        assert in_flight.num_bytes == 0
