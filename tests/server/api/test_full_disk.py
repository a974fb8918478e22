"""Every route that writes, on a full disk: a clear 503, nothing half-written, and recovery later."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from adapters.library import Library
from server.api.app import create_app
from server.api.imports import get_fetch
from server.jobs.files import JobFiles
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.model.base.hub import HubAdapter
from server.storage.reserve import Reserve
from tests.kits.small_disk import fill, make_room, mounted
from tests.server.api.access.key_kit import OPERATORS, client_with
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS, StandIn, submit, train_body
from tests.server.conftest import MakeServices

pytestmark = pytest.mark.anyio

READS = {
    *("/generate", "/compare", "/decide", "/tokenize", "/detokenize"),
    *("/v1/chat/completions", "/v1/completions", "/v1/decisions"),
}
"""POST routes that write nothing."""
DELETES_FILES = {
    *("DELETE /datasets/{dataset_id}", "DELETE /v1/files/{file_id}"),
    *("DELETE /train/{job_id}", "DELETE /evaluate/{job_id}"),
}
"""Routes that need no space, or have reserved space: they free space."""
REVOKES = "DELETE /keys/{key_id}"
"""The same: the owner of a stolen key must be able to revoke it on a full disk."""
PAGE = 4096
NO_TABLES = ("smolora.db", "filling", "reserve", "tmp")


@pytest.fixture(autouse=True)
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield HOME with the folder for spooled uploads, as in `smolora serve`."""
    with mounted(tmp_path, 16):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        yield tmp_path


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    app = create_app(make_services(api_keys=OPERATORS, allow_hub_adapters=True, min_free_bytes=0))
    app.dependency_overrides[get_fetch] = lambda: fetch
    return app


def fetch(
    repo: str, revision: str | None, directory: Path, *, max_config: int, max_weights: int, timeout: float
) -> HubAdapter:
    """Replace the hub's download."""
    config, weights = peft_files(seed=7)
    place = directory / "adapter_model.safetensors"
    place.write_bytes(weights)
    return HubAdapter(config_json=config, weights=place, commit="c" * 40)


@dataclass(frozen=True)
class Ask:
    """A request; `options` are httpx's, `status` is the answer if there is space."""

    path: str
    status: int = 200
    options: dict[str, Any] = field(default_factory=dict)


async def asks(client: httpx.AsyncClient, leases: Leases, home: Path) -> dict[str, Ask]:
    """Return a request for every route that writes; in this order, each would succeed."""
    for seed in range(3):
        await client.post("/adapters/up", files=as_parts(*peft_files(seed)))
    await client.post("/adapters/other", files=as_parts(*peft_files(3)))
    await client.put("/adapters/up/aliases/old", json={"version": 1})
    await client.post("/compositions/mix", json={"expression": "up*0.5+other*0.5"})
    content = "\n".join(map(json.dumps, ROWS)).encode()
    dataset = (await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()["id"]
    file = (await client.post("/v1/files", files={"file": ("a.jsonl", content)}, data=PURPOSE)).json()["id"]
    key = (await client.post("/keys", json={"name": "ci"})).json()["id"]
    await client.put("/projects/gone", json={})
    ended = await submit(client)
    StandIn(leases).succeed()
    JobFiles(home).log(ended).write_text("it went well")
    job, paused = await submit(client), await submit(client)
    worker = StandIn(leases)
    worker.step(1)
    leases.release(worker.claim)
    rows = {"file": ("c.jsonl", b'{"text": "measured"}')}
    evaluation = {"adapters": ["base"], "datasets": [(await client.post("/datasets", files=rows)).json()["id"]]}
    measured, dropped = [(await client.post("/evaluate", json=evaluation)).json()["id"] for _ in range(2)]
    assert (await client.post(f"/evaluate/{dropped}/cancel")).status_code == 200
    tuning = {"model": "base", "training_file": file}
    jobs = "/v1/fine_tuning/jobs"
    theirs, their_paused = [(await client.post(jobs, json=tuning)).json()["id"] for _ in range(2)]
    for path in (f"/train/{paused}", f"{jobs}/{their_paused}"):
        assert (await client.post(f"{path}/pause")).status_code == 200
    assert Reserve(home).fill()
    more = content + b'\n{"text": "more"}'
    return {
        "POST /adapters/{name}": Ask("/adapters/up", 201, {"files": as_parts(*peft_files(5))}),
        "POST /adapters/{name}/import": Ask("/adapters/hub/import", 201, {"json": {"repo_id": "some/one"}}),
        "PUT /adapters/{name}/aliases/{alias}": Ask("/adapters/up/aliases/new", 200, {"json": {"version": 2}}),
        "DELETE /adapters/{name}/aliases/{alias}": Ask("/adapters/up/aliases/old", 204),
        "PUT /adapters/{name}/visibility": Ask("/adapters/up/visibility", 200, {"json": {"visibility": "public"}}),
        "POST /compositions/{name}": Ask("/compositions/mix", 201, {"json": {"expression": "up*2"}}),
        "POST /compositions/{name} merge": Ask(
            "/compositions/merged", 202, {"json": {"expression": "up*0.5+other", "method": "svd"}}
        ),
        "DELETE /v1/models/{model}": Ask("/v1/models/mix@1"),
        "DELETE /adapters/{name}/{version}": Ask("/adapters/up/1?force=true", 204),
        "DELETE /adapters/{name}": Ask("/adapters/mix", 204),
        "POST /datasets": Ask("/datasets", 201, {"files": {"file": ("b.jsonl", more)}}),
        "DELETE /datasets/{dataset_id}": Ask(f"/datasets/{dataset}", 204),
        "POST /v1/files": Ask("/v1/files", 200, {"files": {"file": ("b.jsonl", more)}, "data": PURPOSE}),
        "POST /train": Ask("/train", 202, {"json": train_body()}),
        "POST /train/{job_id}/pause": Ask(f"/train/{job}/pause"),
        "POST /train/{job_id}/stop": Ask(f"/train/{job}/stop"),
        "POST /train/{job_id}/resume": Ask(f"/train/{paused}/resume"),
        "POST /train/{job_id}/cancel": Ask(f"/train/{job}/cancel"),
        "DELETE /train/{job_id}": Ask(f"/train/{ended}", 204),
        "POST /evaluate": Ask("/evaluate", 202, {"json": evaluation}),
        "POST /evaluate/{job_id}/cancel": Ask(f"/evaluate/{measured}/cancel"),
        "DELETE /evaluate/{job_id}": Ask(f"/evaluate/{dropped}", 204),
        "POST /v1/fine_tuning/jobs": Ask(jobs, 200, {"json": tuning}),
        "POST /v1/fine_tuning/jobs/{job_id}/pause": Ask(f"{jobs}/{theirs}/pause"),
        "POST /v1/fine_tuning/jobs/{job_id}/resume": Ask(f"{jobs}/{their_paused}/resume"),
        "POST /v1/fine_tuning/jobs/{job_id}/cancel": Ask(f"{jobs}/{theirs}/cancel"),
        "DELETE /v1/files/{file_id}": Ask(f"/v1/files/{file}", 409),  # a job still needs it
        "POST /keys": Ask("/keys", 201, {"json": {"name": "laptop"}}),
        "PATCH /keys/{key_id}": Ask(f"/keys/{key}", 200, {"json": {"name": "desk"}}),
        "DELETE /keys/{key_id}": Ask(f"/keys/{key}"),
        "PUT /projects/{project}": Ask("/projects/acme", 200, {"json": {"max_jobs": 2}}),
        "PATCH /projects/{project}": Ask("/projects/gone", 200, {"json": {"max_jobs": 3}}),
        "DELETE /projects/{project}": Ask("/projects/gone", 204),
    }


PURPOSE = {"purpose": "fine-tune"}


async def stored(client: httpx.AsyncClient, home: Path) -> dict[str, object]:
    """Return everything that clients see, and every file except the database's."""
    lists = ("/adapters", "/train", "/evaluate", "/datasets", "/keys", "/projects")
    paths = (*lists, "/v1/files", "/v1/fine_tuning/jobs", "/v1/models")
    seen: dict[str, object] = {path: (await client.get(path)).json() for path in paths}
    for job in (await client.get("/train")).json()["jobs"]:
        seen[job["id"]] = (await client.get(f"/train/{job['id']}/events")).json()
    files = (str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    return seen | {name: "a file" for name in files if not name.startswith(NO_TABLES)}


def changed(before: dict[str, object], now: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Return the differences between before and after."""
    names = before.keys() | now.keys()
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def leave_no_room(database: sa.Engine, home: Path, leave: int = 0) -> None:
    """Fill the disk, including reusable pages of the database's log."""
    with database.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    fill(home, leave)


async def test_every_route_that_writes(
    app: FastAPI, leases: Leases, database: sa.Engine, small_disk: Path
) -> None:
    async with client_with(app, OPERATORS) as client:
        wanted = await asks(client, leases, small_disk)
        assert {name.removesuffix(" merge") for name in wanted} == writing(app)
        before = await stored(client, small_disk)
        answers = {}
        for name, ask in wanted.items():
            if name in DELETES_FILES or name == REVOKES:
                continue
            leave_no_room(database, small_disk)
            response = await client.request(name.split()[0], ask.path, **ask.options)
            answers[name] = response.status_code
            now = await stored(client, small_disk)
            assert changed(before, now) == {}, (name, response.text)
            if response.status_code == 503:
                check_words(name, response)
        assert {name: status for name, status in answers.items() if status != 503} == {}
        make_room(small_disk)
        statuses = {name: await status_of(client, name, ask) for name, ask in wanted.items()}
        assert statuses == {name: ask.status for name, ask in wanted.items()}


def writing(app: FastAPI) -> set[str]:
    """Return every method and path that changes something."""
    paths = {path: methods for path, methods in app.openapi()["paths"].items() if path not in READS}
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods if method != "get"}


async def status_of(client: httpx.AsyncClient, name: str, ask: Ask) -> int:
    return (await client.request(name.split()[0], ask.path, **ask.options)).status_code


def check_words(name: str, response: httpx.Response) -> None:
    document = response.json()
    if " /v1/" in name:
        assert "the server's disk is full" in document["error"]["message"], name
        assert document["error"]["code"] == "service_unavailable"
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert "the server's disk is full" in document["detail"], name
    assert int(response.headers["retry-after"]) >= 1


async def test_room_can_be_made(app: FastAPI, leases: Leases, database: sa.Engine, small_disk: Path) -> None:
    """Files can be deleted on a full disk."""
    async with client_with(app, OPERATORS) as client:
        wanted = await asks(client, leases, small_disk)
        for job in (await client.get("/train")).json()["jobs"]:
            await client.post(f"/train/{job['id']}/cancel")  # they need the data
        for name in sorted(DELETES_FILES):
            leave_no_room(database, small_disk)
            assert await status_of(client, name, wanted[name]) in (200, 204), name
            make_room(small_disk)
            assert Reserve(small_disk).fill()  # the next request may need it


async def test_a_key_is_revoked(app: FastAPI, leases: Leases, database: sa.Engine, small_disk: Path) -> None:
    async with client_with(app, OPERATORS) as client:
        wanted = await asks(client, leases, small_disk)
        leave_no_room(database, small_disk)
        assert await status_of(client, REVOKES, wanted[REVOKES]) == 200
        (key,) = (await client.get("/keys")).json()["keys"]
        assert key["revoked_at"] is not None
        make_room(small_disk)
        assert await status_of(client, REVOKES, wanted[REVOKES]) == 200
        assert Reserve(small_disk).fill()


async def test_stored_usage_is_shown_on_a_full_disk(app: FastAPI, database: sa.Engine, small_disk: Path) -> None:
    """It shows who uses the disk."""
    async with client_with(app, OPERATORS) as client:

        async def num_requests() -> int:
            response = await client.get("/usage")
            assert response.status_code == 200, response.text
            return int(response.json()["rows"][0]["requests"])

        for num in (1, 2):
            assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 1})).status_code == 200
            if num == 1:
                assert await num_requests() == 1
        leave_no_room(database, small_disk)
        assert await num_requests() == 1
        make_room(small_disk)
        assert await num_requests() == 2


@pytest.mark.parametrize(
    "name",
    ["POST /adapters/{name}", "POST /compositions/{name}", "POST /train", "DELETE /adapters/{name}"],
)
async def test_any_remaining_space(
    app: FastAPI, leases: Leases, database: sa.Engine, library: Library, jobs: Jobs, small_disk: Path, name: str
) -> None:
    """The disk fills up at any write, including the commit: refused objects don't exist, after the next start
    either."""
    num_refused = 0
    async with client_with(app, OPERATORS) as client:
        ask = (await asks(client, leases, small_disk))[name]
        before = await stored(client, small_disk)
        while True:
            leave_no_room(database, small_disk, PAGE * num_refused)
            status = await status_of(client, name, ask)
            make_room(small_disk)
            if status == ask.status:
                break
            assert status == 503
            num_refused += 1
            now = await stored(client, small_disk)
            assert changed(before, now) == {}, f"with {num_refused - 1} pages"
            assert library.recover(jobs.is_known).lines() == ()
            now = await stored(client, small_disk)
            assert changed(before, now) == {}, f"with {num_refused - 1} pages, after a start"
    assert num_refused > 3
