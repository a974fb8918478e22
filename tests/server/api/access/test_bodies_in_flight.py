"""The bounds on the memory of all request bodies together, and on requests at once."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from server.api import bodies
from server.api.bodies import SMALL_BODY_BYTES, BytesInFlight
from server.api.lanes import Places
from server.errors import QueueFull
from tests.server.api.access.key_kit import two_projects
from tests.server.api.fakes import until
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

KIB = 1 << 10
JSON = {"Content-Type": "application/json"}


async def test_a_project_holds_three_quarters_at_most_and_gives_all_back() -> None:
    in_flight = BytesInFlight(1024 * KIB)
    with ExitStack() as stack:
        greedy = [stack.enter_context(in_flight.reserving("greedy")) for _ in range(4)]
        for add in greedy[:3]:
            add(256 * KIB)
        with pytest.raises(QueueFull, match="too many large bodies") as caught:
            greedy[3](SMALL_BODY_BYTES + 1)
        assert caught.value.retry_after > 1
        modest = stack.enter_context(in_flight.reserving("modest"))
        modest(256 * KIB)
        with pytest.raises(QueueFull):
            modest(1)
        assert in_flight.num_bytes == 1024 * KIB
    assert in_flight.num_bytes == 0


async def test_a_small_body_is_never_refused() -> None:
    in_flight = BytesInFlight(128 * KIB)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(in_flight.reserving("any"))(SMALL_BODY_BYTES)
        assert in_flight.num_bytes == 10 * SMALL_BODY_BYTES
        add = stack.enter_context(in_flight.reserving("any"))
        add(SMALL_BODY_BYTES)
        with pytest.raises(QueueFull):
            add(1)


async def test_memory_is_returned_to_the_system_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = threading.Semaphore(0)
    monkeypatch.setattr(bodies, "return_freed_memory", returned.release)
    monkeypatch.setattr(bodies, "QUIET_SECONDS", 0.0)
    in_flight = BytesInFlight(1024 * KIB)
    for _ in range(9):
        with in_flight.reserving("any") as add:  # nothing of the kind
            add(256 * KIB)
    await asyncio.sleep(0.01)
    assert not returned.acquire(blocking=False)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(in_flight.reserving("any"))(256 * KIB)
        assert not returned.acquire(blocking=False)
    await until(lambda: returned.acquire(blocking=False))
    await asyncio.sleep(0.01)
    assert not returned.acquire(blocking=False)  # only once


async def test_memory_is_kept_while_bursts_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is locked while it returns memory, so every thread that allocates waits."""
    returned = threading.Semaphore(0)
    monkeypatch.setattr(bodies, "return_freed_memory", returned.release)
    monkeypatch.setattr(bodies, "QUIET_SECONDS", 0.05)
    in_flight = BytesInFlight(1024 * KIB)
    for seconds in (0.0, 0.1):
        with in_flight.reserving("any") as add:
            add(512 * KIB)
            await asyncio.sleep(seconds)  # the second burst is going on when the first one's time is over
    assert not returned.acquire(blocking=False)
    await until(lambda: returned.acquire(blocking=False))
    await asyncio.sleep(0.1)
    assert not returned.acquire(blocking=False)


async def test_half_sent_bodies_are_bounded_and_what_is_beyond_is_429(make_services: MakeServices) -> None:
    services = make_services()
    in_flight = BytesInFlight(500 * KIB, services.metrics.lanes)
    app = new_app(replace(services, limiters=replace(services.limiters, bodies=in_flight)))
    go = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b" " * 100 * KIB
        await go.wait()
        yield b"[]"

    async with client_of(app) as client:
        tasks = [asyncio.create_task(client.post("/generate", content=half(), headers=JSON)) for _ in range(3)]
        await until(lambda: in_flight.num_bytes == 300 * KIB)
        refused = await client.post("/generate", content=b" " * 100 * KIB, headers=JSON)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert 'smolora_refused_total{reason="bodies"} 1.0' in (await client.get("/metrics")).text
        assert (await client.post("/generate", content=b"[]", headers=JSON)).status_code == 422
        rows = b'{"text": "a"}\n' * (8 * KIB)
        upload = await client.post("/datasets", files={"file": ("rows.jsonl", rows)})  # spooled to disk
        assert upload.status_code == 201
        go.set()
        assert [(await task).status_code for task in tasks] == [422] * 3
        assert in_flight.num_bytes == 0


async def test_a_project_has_three_quarters_of_all_requests_at_most(make_services: MakeServices) -> None:
    """However slowly it reads and writes. Probes need no place."""
    services = make_services()
    places = Places("requests", 4, name="connections", metrics=services.metrics.lanes)
    app = new_app(replace(services, limiters=replace(services.limiters, connections=places)))
    go = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"["
        await go.wait()
        yield b"]"

    async with two_projects(app) as projects:
        ask = projects.acme.post
        tasks = [asyncio.create_task(ask("/generate", content=half(), headers=JSON)) for _ in range(3)]
        await until(lambda: places._taken["acme"] == 3)
        refused = await projects.acme.get("/adapters")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert refused.json()["detail"] == "too many requests at once"
        assert (await projects.acme.get("/ready")).status_code == 200
        assert (await projects.other.get("/adapters")).status_code == 200
        assert 'smolora_refused_total{reason="connections"} 1.0' in (await projects.operator.get("/metrics")).text
        go.set()
        assert [(await task).status_code for task in tasks] == [422] * 3
        assert (await projects.acme.get("/adapters")).status_code == 200
    assert not places._taken
