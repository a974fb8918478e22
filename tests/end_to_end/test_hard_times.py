"""Clients that disconnect, full queues and wrong bodies leave no trace in the server."""

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from tests.end_to_end.conftest import MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_QUEUE, AdapterFiles
from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.server import conftest as fake_server
from tests.server.api.test_bad_fields import BAD, body_with

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"
NUM_CLIENTS = 50
AT_ONCE = 4
CANCELLED = 'smolora_requests_total{outcome="cancelled"}'
REFUSED = 'smolora_requests_total{outcome="refused"}'


@pytest.fixture(autouse=True)
def unharmed(server: ServerProcess) -> Iterator[None]:
    """Check afterwards that the server is idle and answers as before."""
    before = server.text(PROMPT, adapter="left", max_tokens=6)
    yield
    server.wait_until_idle()
    assert server.text(PROMPT, adapter="left", max_tokens=6) == before


@pytest.mark.thorough
@pytest.mark.anyio
async def test_fifty_disconnecting_clients(server: ServerProcess, adapter_files: AdapterFiles) -> None:
    digest = server.upload("abandoned", adapter_files.make(21))["digest"]
    chance = random.Random(0)
    visits = [
        (
            {
                "prompt": PROMPT * chance.choice([1, 1, 40]),
                "adapter": chance.choice(["base", "abandoned", "abandoned*0.5+right*-0.5"]),
                "n": chance.choice([1, 1, 2]),
                "temperature": 1.0,  # otherwise speculation doubles the speed of repetitive answers
                "max_tokens": 300,  # longer than any client waits
                "ignore_eos": True,
                "stream": number % 2 == 0,
            },
            chance.uniform(0, 0.7),
        )
        for number in range(NUM_CLIENTS)
    ]
    before = server.counts().get(CANCELLED, 0)
    places = asyncio.Semaphore(AT_ONCE)

    async def visit(client: httpx.AsyncClient, body: dict[str, object], seconds: float) -> bool:
        """Return whether the server finished the answer before the client left."""
        async with places:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await client.post("/generate", json=body)
                    return True
            return False

    for patience in (1, 2, 4, 8):  # a busy machine accepts few before they leave
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            answered = await asyncio.gather(*(visit(client, body, patience * seconds) for body, seconds in visits))
        assert not any(answered)
        server.wait_until_idle()
        gone = server.counts()[CANCELLED] - before
        before += gone
        if gone > NUM_CLIENTS / 2:
            break
    assert NUM_CLIENTS / 2 < gone <= NUM_CLIENTS  # the others left before they were accepted
    assert server.client.delete("/adapters/abandoned").status_code == 204
    server.wait_until_removed(digest)  # nothing holds it any more


@pytest.mark.anyio
async def test_a_full_queue_refuses_and_recovers(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
    refused = server.counts().get(REFUSED, 0)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        numbers = range(MAX_NUM_SEQS + MAX_QUEUE)
        patient = [
            asyncio.create_task(client.post("/generate", json={**body, "stream": number % 2 == 0}))
            for number in numbers
        ]
        await asyncio.to_thread(server.wait_for, requests_running=MAX_NUM_SEQS, requests_waiting=MAX_QUEUE)
        for stream in (False, True):
            response = await client.post("/generate", json={**body, "stream": stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["content-type"] == "application/problem+json"
        assert (await client.get("/ready")).status_code == 200
        assert server.counts()[REFUSED] == refused + 2
        assert not any(task.done() for task in patient)
        for task in patient:
            task.cancel()
        await asyncio.wait(patient)


def test_every_bad_field_is_named(server: ServerProcess) -> None:
    """The API tests' table of bad fields, on a real server, whose length limit differs."""
    too_many = ("max_tokens", fake_server.MAX_MODEL_LEN)
    bodies = [
        (field, body_with(field, MAX_MODEL_LEN if (field, value) == too_many else value)) for field, value in BAD
    ]
    message = {"role": "user", "content": "a"}
    bodies += [
        ("prompt", {}),
        ("messages", {"prompt": "a", "messages": [message]}),
        ("adapters", {"prompt": "a", "adapter": "left", "adapters": [{"name": "left"}]}),
        ("prompt", {"prompt": "a " * MAX_MODEL_LEN}),
        ("messages", {"messages": [{**message, "content": "a " * MAX_MODEL_LEN}]}),
    ]
    steps = server.metrics()["smolora_engine_steps_total"]
    wrong = {}
    for field, body in bodies:
        content = json.dumps(body)  # it writes NaN and Infinity
        headers = {"Content-Type": "application/json"}
        response = server.client.post("/generate", content=content, headers=headers)
        errors = response.json().get("errors", []) if response.status_code == 422 else []
        if field not in [error["loc"][-1] for error in errors]:
            wrong[content[:200]] = (field, response.status_code, response.text[:200])
    assert wrong == {}
    assert server.metrics()["smolora_engine_steps_total"] == steps


def test_missing_objects_and_excessive_sizes(server: ServerProcess) -> None:
    for adapter in ("nobody", "left@7", "left@prod", "left*0.5+nobody*0.5"):
        response = server.client.post("/generate", json={"prompt": "a", "adapter": adapter})
        assert response.status_code == 404, adapter
    assert server.client.get("/adapters/nobody/1/download").status_code == 404
    assert server.client.post("/generate", json={"prompt": "a" * (3 << 20)}).status_code == 413
