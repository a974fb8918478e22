"""Storage quotas: uploads, jobs and versions count, concurrent ones as sequential ones."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from adapters.errors import LimitReached
from adapters.names import Viewpoint
from server.access.principal import OPERATOR, Quota
from server.api.app import create_app
from server.api.imports import get_fetch
from server.jobs.jobs import Jobs
from server.jobs.leases import RULED_OUT, Directive, Leases
from server.jobs.room import training_bytes
from server.model.base.hub import HubAdapter
from server.training.spec import JobSpec
from tests.server.api.access.key_kit import access_of, client_with, new_secret
from tests.server.api.adapters.peft_files import as_parts, as_zip, peft_files
from tests.server.api.train_kit import ROWS, StandIn, submit, train_body
from tests.server.conftest import NUM_PARAMETERS, SHAPE, MakeServices, new_app

pytestmark = pytest.mark.anyio

AT_ONCE = 6
CONFIG, WEIGHTS = peft_files(rank=8)
SIZE = len(CONFIG) + len(WEIGHTS)


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return new_app(make_services())


async def in_chunks(request: httpx.Request) -> AsyncIterator[bytes]:
    """Yield the request's body in chunks, with pauses until all others have got as far."""
    content = await request.aread()
    yield content[:-10]
    await asyncio.sleep(0.05)
    yield content[-10:]


async def send(client: httpx.AsyncClient, name: str, parts: dict[str, tuple[str, bytes]], chunked: bool) -> int:
    """Upload an adapter, without Content-Length if `chunked`; return the status."""
    request = client.build_request("POST", f"/adapters/{name}", files=parts)
    if chunked:
        headers = {"Content-Type": request.headers["content-type"]}
        request = client.build_request("POST", f"/adapters/{name}", content=in_chunks(request), headers=headers)
        assert "content-length" not in request.headers
    return (await client.send(request)).status_code


def limit(app: FastAPI, num_bytes: int) -> str:
    """Limit a project's storage; return its key."""
    access_of(app).projects.put("acme", Quota(max_bytes=num_bytes), who=OPERATOR)
    return new_secret(app, "acme")


async def check(client: httpx.AsyncClient, statuses: list[int], most: int) -> None:
    """Check that some uploads were stored, within the limit, and all others refused."""
    stored = (await client.get("/adapters")).json()["adapters"]
    assert sum(version["bytes"] for adapter in stored for version in adapter["versions"]) <= most
    assert len(stored) == statuses.count(201) >= 1
    assert statuses.count(403) == len(statuses) - len(stored)


@pytest.mark.parametrize("chunked", [True, False])
async def test_uploads_side_by_side(app: FastAPI, chunked: bool) -> None:
    """Each alone would be allowed."""
    most = 2 * SIZE + SIZE // 2
    parts = [as_parts(*peft_files(seed, rank=8)) for seed in range(AT_ONCE)]
    async with client_with(app, limit(app, most)) as client:
        sent = [send(client, f"a{seed}", files, chunked) for seed, files in enumerate(parts)]
        await check(client, await asyncio.gather(*sent), most)


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_upload_that_fills_the_quota(app: FastAPI, chunked: bool) -> None:
    """The reservations of refused uploads are released."""
    request = httpx.Request("POST", "http://a", files=as_parts(CONFIG, WEIGHTS))
    most = SIZE if chunked else int(request.headers["content-length"])
    async with client_with(app, limit(app, most)) as client:
        assert await send(client, "large", as_parts(*peft_files(rank=16)), chunked) == 403
        assert await send(client, "fits", as_parts(CONFIG, WEIGHTS), chunked) == 201


async def test_archives_count_their_contents(app: FastAPI) -> None:
    config, weights = CONFIG, WEIGHTS[:-4096] + bytes(4096)
    archive = as_zip(config, weights)
    most = len(config) + len(weights) - 1
    assert len(archive) + 1024 < most
    async with client_with(app, limit(app, most)) as client:
        assert await send(client, "zeros", {"archive": ("a.zip", archive)}, chunked=False) == 403
        assert (await client.get("/adapters")).json()["adapters"] == []


async def test_imports_side_by_side(make_services: MakeServices) -> None:
    app = create_app(make_services(allow_hub_adapters=True))  # its dependencies are overridden
    most = SIZE + SIZE // 2
    both = threading.Barrier(2)

    def fetch(repo_id: str, revision: str | None, directory: Path, **_: float) -> HubAdapter:
        both.wait(60)
        config, weights = peft_files(int(repo_id[-1]), rank=8)
        (directory / "weights").write_bytes(weights)
        return HubAdapter("c" * 40, config, directory / "weights")

    app.dependency_overrides[get_fetch] = lambda: fetch
    async with client_with(app, limit(app, most)) as client:
        asked = [client.post(f"/adapters/a{n}/import", json={"repo_id": f"some/one-{n}"}) for n in range(2)]
        statuses = [response.status_code for response in await asyncio.gather(*asked)]
        await check(client, statuses, most)


async def test_rows_count_as_they_are_kept(app: FastAPI, tmp_path: Path) -> None:
    """A CSV of control characters is six times as large in JSON: this is checked before it is stored."""
    first, second = (b"text\n" + (character * 999 + b"\n") * 10 for character in (b"\x01", b"\x02"))
    kept = 10 * (len(b'{"text":""}\n') + 6 * 999)
    async with client_with(app, limit(app, kept + 1000)) as client:  # the form is larger than its file
        assert (await client.post("/datasets", files={"file": ("a.csv", first)})).status_code == 201
        refused = await client.post("/datasets", files={"file": ("b.csv", second)})
        assert refused.status_code == 403
        assert f"has {kept}" in refused.json()["detail"]
        for dataset in (await client.get("/datasets")).json()["datasets"]:
            assert dataset["bytes"] == len(first)
            assert (await client.delete(f"/datasets/{dataset['id']}")).status_code == 204
        access_of(app).projects.put("acme", Quota(max_bytes=kept - 1), who=OPERATOR)
        refused = await client.post("/datasets", files={"file": ("b.csv", second)})
        assert refused.status_code == 403
        assert not any(path.is_file() for path in tmp_path.glob("**/datasets/**/*"))


async def test_many_small_uploads_count_as_their_folders_do(app: FastAPI) -> None:
    """Thousands of files of a few bytes each must not fill the disk."""
    async with client_with(app, limit(app, 20_000)) as client:
        found = [
            (await client.post("/datasets", files={"file": (f"{number}.csv", b"text\n%d\n" % number)})).status_code
            for number in range(3)
        ]
    assert found == [201, 201, 403]


JOB_BYTES = training_bytes(JobSpec("codes"), SHAPE, NUM_PARAMETERS)
"""What a job of the defaults may store, apart from its rows."""


def quota_of(app: FastAPI, quota: Quota) -> str:
    """Set a project's limits; return its key."""
    access_of(app).projects.put("acme", quota, who=OPERATOR)
    return new_secret(app, "acme")


async def test_jobs_count_until_they_end(app: FastAPI, jobs: Jobs, leases: Leases) -> None:
    """With all that they may store. Afterwards only what they leave behind counts."""
    async with client_with(app, quota_of(app, Quota(max_bytes=2 * JOB_BYTES + JOB_BYTES // 2))) as client:
        first = await submit(client)
        assert JOB_BYTES < jobs.of(Viewpoint("acme")).num_bytes() < 1.1 * JOB_BYTES
        second = await submit(client)
        refused = await client.post("/train", json=train_body())
        assert refused.status_code == 403
        assert "ended jobs" in refused.json()["detail"]
        assert (await client.post(f"/train/{first}/cancel")).status_code == 200
        third = await submit(client)
        ended = StandIn(leases)
        assert ended.claim.job_id == second
        ended.succeed()
        await submit(client)
        StandIn(leases).fail("no")
        assert (await client.get(f"/train/{third}")).json()["status"] == "failed"
        await submit(client)
    async with client_with(app, new_secret(app, "other")) as other:
        await submit(other)


async def test_jobs_submitted_at_once_stay_within_the_quota(app: FastAPI, tmp_path: Path) -> None:
    async with client_with(app, quota_of(app, Quota(max_bytes=3 * JOB_BYTES + JOB_BYTES // 2))) as client:
        sent = [client.post("/train", json=train_body(name=f"a{number}")) for number in range(8)]
        statuses = [response.status_code for response in await asyncio.gather(*sent)]
    # a job that was just queued may count twice for a moment
    assert 1 <= statuses.count(202) <= 3
    assert statuses.count(202) + statuses.count(403) == 8
    assert len(list((tmp_path / "jobs").iterdir())) == statuses.count(202)  # refused jobs leave no rows


@pytest.mark.parametrize("limit", ["project", "key"])
async def test_full_fine_tuning_needs_room_for_the_model(app: FastAPI, limit: str) -> None:
    most = Quota(max_bytes=20 * NUM_PARAMETERS)
    if limit == "project":
        access_of(app).projects.put("acme", most, who=OPERATOR)
    secret = new_secret(app, "acme", quota=most if limit == "key" else None)
    async with client_with(app, secret) as client:
        refused = await client.post("/train", json=train_body(method="full"))
        assert refused.status_code == 403
        assert refused.json()["detail"].startswith(f"the {limit} ")
        await submit(client)


async def test_merges_and_evaluations_count(app: FastAPI, jobs: Jobs) -> None:
    async with client_with(app, quota_of(app, Quota(max_bytes=10 * JOB_BYTES))) as client:
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        content = "\n".join(map(json.dumps, ROWS)).encode()
        dataset = (await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()["id"]
        merge = ("/compositions/b", {"expression": "a", "method": "svd", "rank": 4})
        evaluation = ("/evaluate", {"adapters": ["base", "a"], "datasets": [dataset]})
        for path, body in (merge, evaluation):
            before = jobs.of(Viewpoint("acme")).num_bytes()
            assert (await client.post(path, json=body)).status_code == 202
            assert jobs.of(Viewpoint("acme")).num_bytes() > before + 64_000
        access_of(app).projects.put("acme", Quota(max_bytes=10), who=OPERATOR)
        for path, body in (merge, evaluation):
            assert (await client.post(path, json=body)).status_code == 403


async def test_versions_are_limited(app: FastAPI, leases: Leases) -> None:
    """A job that may publish a version counts as one from its submission on."""
    async with client_with(app, quota_of(app, Quota(max_versions=3))) as client:
        await submit(client)
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        sent = [client.post("/compositions/mix", json={"expression": f"a*0.{n}"}) for n in range(1, 8)]
        statuses = [response.status_code for response in await asyncio.gather(*sent)]
        assert sorted(statuses) == [201] + [403] * 6
        bodies: list[tuple[str, dict[str, object]]] = [
            ("/compositions/more", {"expression": "a*3"}),
            ("/compositions/more", {"expression": "a", "method": "svd", "rank": 1}),
            ("/train", train_body()),
        ]

        async def check_refusals(reserved: str) -> None:
            answers = [await client.post(path, json=body) for path, body in bodies]
            for refused in (*answers, await client.post("/adapters/b", files=as_parts(CONFIG, WEIGHTS))):
                assert refused.status_code == 403, refused.text
                assert f"has 3 versions,{reserved} and may have 3" in refused.json()["detail"]

        await check_refusals(" 1 of them reserved by unfinished jobs,")
        assert (await client.post("/train", json=train_body(method="full"))).status_code == 202  # publishes none
        StandIn(leases).succeed(digest="ab" * 32)  # the job that was submitted first
        await check_refusals("")
        assert (await client.delete("/adapters/mix")).status_code == 204
        assert (await client.post("/adapters/b", files=as_parts(CONFIG, WEIGHTS))).status_code == 201


async def test_jobs_submitted_at_once_reserve_their_versions(app: FastAPI, leases: Leases) -> None:
    async with client_with(app, quota_of(app, Quota(max_versions=2))) as client:
        sent = [client.post("/train", json=train_body(name=f"a{number}")) for number in range(6)]
        answers = await asyncio.gather(*sent)
        assert sorted(answer.status_code for answer in answers) == [202] * 2 + [403] * 4
        first, second = (answer.json()["id"] for answer in answers if answer.status_code == 202)
        assert (await client.post(f"/train/{first}/cancel")).status_code == 200
        third = await submit(client)
        access_of(app).projects.put("acme", Quota(max_versions=1), who=OPERATOR)
        running = StandIn(leases)
        assert running.claim.job_id == second
        with pytest.raises(LimitReached, match="larger max_versions"):  # the third has reserved the only one left
            running.succeed(digest="ab" * 32)
        running.fail("no")
        assert StandIn(leases).claim.job_id == third


async def test_a_keys_versions_are_limited(app: FastAPI) -> None:
    secret = new_secret(app, "acme", quota=Quota(max_versions=1))
    async with client_with(app, secret) as client, client_with(app, new_secret(app, "acme")) as colleague:
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 403
        assert (await client.post("/train", json=train_body())).status_code == 403
        assert (await colleague.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        await submit(colleague)  # a job of another key


async def test_long_lists_cost_requests(app: FastAPI) -> None:
    """Each 256 KiB of a list's answer counts as a request, so that a minute's lists are bounded, too."""
    async with client_with(app, new_secret(app, quota=Quota(requests_per_minute=40))) as client:
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        for number in range(1, 31):
            body = {"expression": f"a*0.{number:02}1"}
            assert (await client.post("/compositions/mix", json=body)).status_code == 201
        short = await client.get("/adapters/a")
        assert short.headers["x-ratelimit-remaining-requests"] == "9"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("server.api.edge.LIST_BYTES", 4096)
            answer = await client.get("/adapters")
            assert answer.status_code == 200
            cost = len(answer.content) // 4096
            assert cost > 3
            remaining = 9
            while answer.status_code == 200:
                remaining = max(0, remaining - cost)
                assert answer.headers["x-ratelimit-remaining-requests"] == str(remaining)
                answer = await client.get("/adapters")
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/adapters/a/1")).status_code == 200  # not a list


async def test_downloads_count_as_requests(app: FastAPI) -> None:
    async with client_with(app, new_secret(app, quota=Quota(requests_per_minute=2))) as client:
        assert (await client.post("/adapters/a", files=as_parts(CONFIG, WEIGHTS))).status_code == 201
        statuses = [(await client.get("/adapters/a/1/download")).status_code for _ in range(2)]
        assert statuses == [200, 429]
        assert (await client.get("/adapters/a/1")).status_code == 200


@pytest.mark.parametrize("limit", ["project", "key"])
async def test_full_fine_tuning_can_be_ruled_out(app: FastAPI, limit: str) -> None:
    never = Quota(allow_full=False)
    access_of(app).projects.put("acme", never if limit == "project" else Quota(allow_full=True), who=OPERATOR)
    secret = new_secret(app, "acme", quota=never if limit == "key" else None)
    async with client_with(app, secret) as client:
        for path in ("/train", "/train?dry_run=true"):
            refused = await client.post(path, json=train_body(method="full"))
            assert (refused.status_code, "allow_full" in refused.json()["detail"]) == (403, True)
        await submit(client)


@pytest.mark.parametrize("limit", ["project", "key"])
async def test_a_queued_job_of_full_fine_tuning_fails_once_it_is_ruled_out(
    app: FastAPI, leases: Leases, limit: str
) -> None:
    """A repeated request still gets the job that the first one made."""
    access, once = access_of(app), {"Idempotency-Key": "once"}
    key, secret = access.keys.create("ci", who=OPERATOR, project="acme")
    async with client_with(app, secret) as client:
        first = await client.post("/train", json=train_body(method="full"), headers=once)
        assert first.status_code == 202, first.text
        other = await submit(client)
        if limit == "project":
            access.projects.put("acme", Quota(allow_full=False), who=OPERATOR)
        else:
            access.keys.change(key.id, {"limits": {"allow_full": False}}, who=OPERATOR)
        again = await client.post("/train", json=train_body(method="full"), headers=once)
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        claim = leases.claim("worker")
        assert claim is not None
        assert claim.job_id == other
        job = (await client.get(f"/train/{first.json()['id']}")).json()
        assert (job["status"], job["error"]) == ("failed", RULED_OUT)


@pytest.mark.parametrize("limit", ["project", "key"])
async def test_a_job_ends_after_its_seconds(app: FastAPI, database: sa.Engine, limit: str) -> None:
    clock = [1000.0]
    leases = Leases(database, now=lambda: sa.literal(clock[0], sa.Float(53)))
    limits = {name: Quota(max_job_seconds=20 if name == limit else 40) for name in ("project", "key")}
    access_of(app).projects.put("acme", limits["project"], who=OPERATOR)
    async with client_with(app, new_secret(app, "acme", quota=limits["key"])) as client:
        job = await submit(client)
        for _ in range(2):  # two attempts together
            claim = leases.claim("worker", 60)
            assert claim is not None
            clock[0] += 9
            assert leases.heartbeat(claim, 60) is Directive.GO_ON
            leases.release(claim)
            clock[0] += 100
        claim = leases.claim("worker", 60)
        assert claim is not None
        clock[0] += 3
        assert leases.heartbeat(claim, 60) is Directive.CANCEL
        ended = (await client.get(f"/train/{job}")).json()
        assert (ended["status"], "longer than 20 s" in ended["error"]) == ("failed", True)
        assert leases.claim("worker") is None
