"""GET /train/{id}/events as JSON, and as server-sent events until the job ends."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from server.api.job_feeds import JobFeeds
from server.jobs import tables as job_tables
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from tests.server.api.fakes import Caller, FakeEngine, until
from tests.server.api.train_kit import StandIn, submit

pytestmark = pytest.mark.anyio

SSE = {"Accept": "text/event-stream"}


def parse(stream: bytes) -> list[tuple[int, dict[str, object]]]:
    """Return (id, data) of each event, without comments."""
    found = []
    for block in stream.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            first, second = lines
            found.append((int(first.removeprefix("id: ")), json.loads(second.removeprefix("data: "))))
    return found


async def finished(client: httpx.AsyncClient, leases: Leases) -> str:
    """Make a job with the events queued, started, two steps, succeeded."""
    job_id = await submit(client)
    worker = StandIn(leases)
    worker.step(1, 2.0)
    worker.step(2, 1.0)
    worker.succeed()
    return job_id


async def test_as_json(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = await finished(client, leases)
    events = (await client.get(f"/train/{job_id}/events")).json()
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5]
    assert [event["type"] for event in events] == ["message", "message", "metrics", "metrics", "message"]
    assert [event["message"] for event in events[:3]] == ["queued", "started", "step 1: loss 2.0000"]
    assert events[2] == {
        "seq": 3,
        "at": events[2]["at"],
        "level": "info",
        "type": "metrics",
        "message": "step 1: loss 2.0000",
        "data": {"step": 1, "train_loss": 2.0},
    }
    times = [datetime.fromisoformat(event["at"]) for event in events]
    assert times == sorted(times)
    assert (await client.get(f"/train/{job_id}/events?after=3")).json() == events[3:]
    assert (await client.get(f"/train/{job_id}/events?after=1&limit=2")).json() == events[1:3]
    assert (await client.get(f"/train/{job_id}/events?after=5")).json() == []


async def test_a_list_that_is_cut_has_a_link(client: httpx.AsyncClient, leases: Leases) -> None:
    path = f"/train/{await finished(client, leases)}/events"
    found: list[int] = []
    following: str | None = f"{path}?limit=2"
    while following is not None:
        response = await client.get(following)
        found += [event["seq"] for event in response.json()]
        following = response.links.get("next", {}).get("url")
    assert found == [1, 2, 3, 4, 5]
    for query in ("", "?after=3", "?limit=5", "?after=2&limit=3", "?after=9&limit=1"):
        assert "link" not in (await client.get(f"{path}{query}")).headers, "nothing follows"


async def test_ten_thousand_events(client: httpx.AsyncClient, database: sa.Engine) -> None:
    job_id = await submit(client)
    row = {
        "job_id": job_id,
        "at": datetime.now(UTC),
        "level": "info",
        "type": "metrics",
        "message": "",
        "data": {},
    }
    with database.begin() as connection:
        connection.execute(sa.insert(job_tables.events), [row | {"seq": seq} for seq in range(2, 10_003)])
    response = await client.get(f"/train/{job_id}/events")
    assert [event["seq"] for event in response.json()] == list(range(1, 10_001))
    assert response.headers["link"] == f'</train/{job_id}/events?after=10000>; rel="next"'
    rest = await client.get(response.links["next"]["url"])
    assert [event["seq"] for event in rest.json()] == [10_001, 10_002]
    assert "link" not in rest.headers


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=4294967296", "limit=0", "limit=10001"])
async def test_bad_queries(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/train/{await submit(client)}/events?{query}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == [query.partition("=")[0]]


@pytest.mark.parametrize(
    ("query", "headers", "first"),
    [
        ("", {}, 1),
        ("?after=2", {}, 3),
        ("", {"Last-Event-ID": "4"}, 5),
        ("?after=1", {"Last-Event-ID": "3"}, 4),
        ("?after=5", {}, 6),
    ],
)
async def test_a_stream_of_what_has_ended(
    client: httpx.AsyncClient, leases: Leases, query: str, headers: dict[str, str], first: int
) -> None:
    job_id = await finished(client, leases)
    events = (await client.get(f"/train/{job_id}/events")).json()
    response = await client.get(f"/train/{job_id}/events{query}", headers=SSE | headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert parse(response.content) == [(event["seq"], event) for event in events[first - 1 :]]


async def test_a_stream_of_no_job(client: httpx.AsyncClient) -> None:
    response = await client.get("/train/nothing/events", headers=SSE)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_bad_last_event_id(client: httpx.AsyncClient) -> None:
    response = await client.get(f"/train/{await submit(client)}/events", headers=SSE | {"Last-Event-ID": "x"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["Last-Event-ID"]


class Listener:
    """A follower of a job with short timeouts."""

    def __init__(self, jobs: Jobs, job_id: str, after: int = 0) -> None:
        self.pieces: list[bytes] = []
        self.task = asyncio.ensure_future(self._listen(jobs, job_id, after))

    async def _listen(self, jobs: Jobs, job_id: str, after: int) -> None:
        follower = JobFeeds(jobs, poll=0.005, keep_alive=0.05).follow(job_id, after)
        async for piece in follower.stream():
            self.pieces.append(piece)
        await follower.close()

    @property
    def messages(self) -> Sequence[object]:
        return [event["message"] for _, event in parse(b"".join(self.pieces))]


async def test_events_as_they_happen(client: httpx.AsyncClient, jobs: Jobs, leases: Leases) -> None:
    listener = Listener(jobs, await submit(client))
    await until(lambda: listener.messages == ["queued"])
    worker = StandIn(leases)
    await until(lambda: len(listener.messages) == 2)
    worker.step(1)
    await until(lambda: len(listener.messages) == 3)
    assert not listener.task.done()
    worker.succeed()
    await asyncio.wait_for(listener.task, 60)
    assert [seq for seq, _ in parse(b"".join(listener.pieces))] == [1, 2, 3, 4]


async def test_keep_alives_while_nothing_happens(client: httpx.AsyncClient, jobs: Jobs) -> None:
    listener = Listener(jobs, await submit(client), after=1)
    await until(lambda: len(listener.pieces) >= 3)
    assert parse(b"".join(listener.pieces)) == []
    assert all(piece.startswith(b":") and piece.endswith(b"\n\n") for piece in listener.pieces)
    jobs.cancel((await client.get("/train")).json()["jobs"][0]["id"])
    await asyncio.wait_for(listener.task, 60)
    assert listener.messages == ["cancelled"]


async def test_more_events_than_are_read_at_once(client: httpx.AsyncClient, jobs: Jobs, leases: Leases) -> None:
    job_id = await submit(client)
    worker = StandIn(leases)
    for step in range(1, 1200):
        leases.add_metrics(worker.claim, "", {"step": step})
        leases.flush(worker.claim)
    worker.succeed()
    listener = Listener(jobs, job_id)
    await asyncio.wait_for(listener.task, 60)
    assert [seq for seq, _ in parse(b"".join(listener.pieces))] == list(range(1, 1203))


async def test_a_server_that_ends(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    job_id = await submit(client)
    caller = Caller(app, f"/train/{job_id}/events", None, "GET", [(b"accept", b"text/event-stream")])
    await until(lambda: len(caller.sent) >= 3)
    engine.drain()
    await asyncio.wait_for(caller.task, 60)
    assert caller.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_listener_that_leaves(app: FastAPI, client: httpx.AsyncClient) -> None:
    job_id = await submit(client)
    caller = Caller(app, f"/train/{job_id}/events", None, "GET", [(b"accept", b"text/event-stream")])
    await until(lambda: len(caller.sent) >= 3)
    assert caller.sent[0]["status"] == 200
    caller.hang_up()
    await asyncio.wait_for(caller.task, 60)
