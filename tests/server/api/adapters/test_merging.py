"""POST /compositions/{name} with a method: queued jobs, refusals, and the parts that the job protects."""

import asyncio
import threading
from dataclasses import replace

import httpx
import pytest

from adapters.catalog.catalog import Part, combine
from adapters.catalog.versions import Origin
from adapters.errors import InvalidInput
from adapters.expression import parse
from adapters.library import Library
from adapters.merge import merge
from adapters.merge_recipe import Recipe
from adapters.store.store import AdapterStore
from server.api import compositions
from server.api.lanes import Lane, Turns
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.jobs.merge_spec import MergeSpec, read_origin
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import until
from tests.server.api.train_kit import StandIn, submit
from tests.server.conftest import BASE_NAME, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

NUM_MODULES = 6  # three in each of two layers


async def upload(client: httpx.AsyncClient, name: str, seed: int, rank: int = 2) -> str:
    """Publish an adapter; return its digest."""
    response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed, rank)))
    assert response.status_code == 201, response.text
    return str(response.json()["digest"])


async def compose(client: httpx.AsyncClient, name: str, **body: object) -> httpx.Response:
    return await client.post(f"/compositions/{name}", json=body)


def field_of(response: httpx.Response) -> str:
    """Return the single bad field."""
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    return str(error["loc"][-1])


async def test_a_merge_is_queued(client: httpx.AsyncClient, jobs: Jobs) -> None:
    left, old = await upload(client, "left", 1), await upload(client, "right", 2)
    await upload(client, "right", 3)
    response = await compose(
        client, "both", expression="left*0.7 + right@1*-0.25", method="dare_ties", density=0.5, seed=7, rank=3
    )
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/train/{job['id']}"
    assert (job["kind"], job["name"], job["status"], job["adapter"]) == ("merge", "both", "queued", None)
    assert (job["progress"]["step"], job["progress"]["total_steps"]) == (0, NUM_MODULES)
    assert job["data"] is None
    assert job["config"] == {
        "kind": "merge",
        "name": "both",
        "expression": "left@1*0.7+right@1*-0.25",
        "method": "dare_ties",
        "density": 0.5,
        "seed": 7,
        "rank": 3,
        "parts": [
            {"name": "left", "version": 1, "digest": left, "weight": 0.7},
            {"name": "right", "version": 1, "digest": old, "weight": -0.25},
        ],
    }
    assert (await client.get(f"/train/{job['id']}")).json() == job
    spec = jobs.get(job["id"]).spec
    parts = (Part("left", 1, left, 0.7), Part("right", 1, old, -0.25))
    assert spec == MergeSpec("both", parts, Recipe("dare_ties", 0.5, 7, 3))
    assert (await client.get("/adapters/both")).status_code == 404


async def test_ranks_are_compared_without_reading_weights(
    client: httpx.AsyncClient, library: Library, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [await upload(client, "left", 1), await upload(client, "wide", 2, rank=4)]
    for digest in digests:
        assert library.ranks(digest) == store.load(digest).ranks
    for name in ("read", "load", "_read"):
        monkeypatch.setattr(AdapterStore, name, lambda *_: pytest.fail("weights are read"))
    assert field_of(await compose(client, "m", expression="left+wide", method="ties")) == "rank"
    response = await compose(client, "m", expression="left+wide", method="svd")
    assert (response.status_code, response.json()["progress"]["total_steps"]) == (202, NUM_MODULES)


async def test_merges_wait_in_a_lane_of_their_own(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = make_services()
    lane = Lane("merging", "merges", Turns(1), 1)
    app = new_app(replace(services, limiters=replace(services.limiters, merging=lane)))
    go, thread_names = threading.Event(), []

    def blocked(*_: object) -> None:
        thread_names.append(threading.current_thread().name)
        assert go.wait(60)
        raise InvalidInput.of("rank", "unequal")

    monkeypatch.setattr(compositions, "submit_merge", blocked)
    async with client_of(app) as client:
        tasks = [asyncio.create_task(compose(client, "m", expression="a+b", method="ties")) for _ in range(2)]
        await until(lambda: lane.num_waiting == 1)
        assert (await compose(client, "m", expression="a+b", method="ties")).status_code == 429
        assert (await client.get("/adapters")).status_code == 200  # in a thread of the shared pool
        go.set()
        assert [field_of(await task) for task in tasks] == ["rank", "rank"]
        assert thread_names == ["lane-merging"] * 2


async def test_what_is_left_out(client: httpx.AsyncClient) -> None:
    await upload(client, "left", 1)
    for method, density in (("ties", 0.5), ("magnitude_prune", 0.5), ("svd", 1.0)):
        config = (await compose(client, "m", expression="left", method=method)).json()["config"]
        assert (config["density"], config["seed"], config["rank"]) == (density, 0, None)
    assert (await compose(client, "m", expression="left", method="svd", density=1)).status_code == 202


async def test_merge_keeps_its_parts_base(client: httpx.AsyncClient, library: Library, jobs: Jobs) -> None:
    """A part may be deleted or withdrawn before the job ends."""
    await upload(client, "left", 1)
    await upload(client, "right", 2)
    job = (await compose(client, "both", expression="left+right", method="ties")).json()
    origin = Origin.of(library.catalog.version(name, 1) for name in ("left", "right"))
    assert origin.base_model is not None
    assert read_origin(jobs.get(job["id"]).data) == origin


async def test_its_parts_stay_until_it_has_ended(client: httpx.AsyncClient, leases: Leases) -> None:
    await upload(client, "left", 1)
    await upload(client, "left", 2)
    await upload(client, "right", 3)
    job = (await compose(client, "both", expression="left@1+right", method="ties")).json()
    assert (await client.delete("/adapters/left/2")).status_code == 204
    for path in ("/adapters/left/1", "/adapters/left", "/adapters/right"):
        response = await client.delete(path)
        assert response.status_code == 409
        assert path.split("/")[2] in response.json()["detail"]
    worker = StandIn(leases)
    assert worker.claim.job_id == job["id"]
    assert (await client.delete("/adapters/left/1")).status_code == 409
    worker.fail("no reason")
    assert (await client.delete("/adapters/left/1")).status_code == 204
    assert (await client.delete("/adapters/right")).status_code == 204


async def test_it_is_steered_like_any_job(client: httpx.AsyncClient, leases: Leases) -> None:
    await upload(client, "left", 1)
    job = (await compose(client, "m", expression="left", method="ties")).json()
    training = await submit(client)
    listed = (await client.get("/train")).json()["jobs"]
    assert [(found["id"], found["kind"]) for found in listed] == [(training, "train"), (job["id"], "merge")]
    assert (await client.post(f"/train/{job['id']}/pause")).json()["status"] == "paused"
    assert (await client.post(f"/train/{job['id']}/resume")).json()["position"] == 1
    assert (await client.get(f"/train/{job['id']}/report")).status_code == 409
    assert (await client.post(f"/train/{job['id']}/cancel")).json()["status"] == "cancelled"
    assert StandIn(leases).claim.job_id == training
    events = (await client.get(f"/train/{job['id']}/events")).json()
    assert [event["message"] for event in events] == ["queued", "paused", "resumed", "cancelled"]
    assert (await client.get(f"/train/{job['id']}/download")).status_code == 404


async def test_a_key_makes_it_once(client: httpx.AsyncClient) -> None:
    await upload(client, "left", 1)
    body = {"expression": "left", "method": "ties"}
    headers = {"Idempotency-Key": "k"}
    first = await client.post("/compositions/m", json=body, headers=headers)
    again = await client.post("/compositions/m", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    for path, other in (("/compositions/other", body), ("/compositions/m", {**body, "density": 0.25})):
        response = await client.post(path, json=other, headers=headers)
        assert field_of(response) == "Idempotency-Key"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("method", {"method": "linear"}),
        ("method", {"method": 3}),
        ("density", {"method": "ties", "density": 0}),
        ("density", {"method": "ties", "density": 1.01}),
        ("density", {"method": "ties", "density": -0.5}),
        ("density", {"method": "ties", "density": "0.5"}),
        ("density", {"method": "svd", "density": 0.5}),
        ("seed", {"method": "dare_ties", "seed": -1}),
        ("seed", {"method": "dare_ties", "seed": 1 << 63}),
        ("seed", {"method": "dare_ties", "seed": 0.5}),
        ("rank", {"method": "svd", "rank": 0}),
        ("rank", {"method": "svd", "rank": 257}),
        ("rank", {"method": "svd", "rank": "8"}),
        ("rank", {"method": "ties", "expression": "left+wide"}),
        ("density", {"density": 0.5}),
        ("seed", {"seed": 0}),
        *(("seed", {"method": method, "seed": 0}) for method in ("ties", "magnitude_prune", "svd")),
        ("rank", {"rank": 4}),
        ("expression", {"method": "ties", "expression": "left*"}),
        ("expression", {"method": "ties", "expression": "base"}),
        ("expression", {"method": "ties", "expression": "left*0.5+left@1*-0.5"}),
        ("expression", {"method": "ties", "expression": ""}),
        ("expression", {"method": "ties", "expression": None}),
        ("alpha", {"method": "ties", "alpha": 4}),
    ],
)
async def test_bad_fields(client: httpx.AsyncClient, field: str, body: dict[str, object]) -> None:
    await upload(client, "left", 1)
    await upload(client, "wide", 2, rank=4)
    assert field_of(await compose(client, "m", **{"expression": "left", **body})) == field
    assert (await client.get("/train")).json()["jobs"] == []


@pytest.mark.parametrize("method", ["linear", "cat"])
async def test_pefts_names_of_the_exact_sum_are_explained(client: httpx.AsyncClient, method: str) -> None:
    (error,) = (await compose(client, "m", expression="left", method=method)).json()["errors"]
    assert error == {
        "loc": ["method"],
        "message": "leave it out for the exact sum, or give svd and the sum of the ranks to store it",
    }


async def test_not_a_number(client: httpx.AsyncClient) -> None:
    body = '{"expression": "left", "method": "ties", "density": NaN}'
    response = await client.post("/compositions/m", content=body, headers={"Content-Type": "application/json"})
    assert field_of(response) == "density"


async def test_names(client: httpx.AsyncClient) -> None:
    await upload(client, "left", 1)
    for name in ("base", BASE_NAME, "-m", "m" * 65):
        assert field_of(await compose(client, name, expression="left", method="ties")) == "name"
    response = await compose(client, "m", expression="left+nobody", method="ties")
    assert response.status_code == 404
    assert "nobody" in response.json()["detail"]
    assert (await compose(client, "blend", expression="left*0.5")).status_code == 201
    assert (await compose(client, "blend", expression="left", method="ties")).status_code == 409
    assert (await compose(client, "left", expression="left", method="ties")).status_code == 202


async def test_compositions_among_the_parts(client: httpx.AsyncClient) -> None:
    """They are expanded: adapters are merged, each with its total weight."""
    await upload(client, "left", 1)
    await upload(client, "right", 2)
    assert (await compose(client, "blend", expression="left*0.5+right*-1")).status_code == 201
    response = await compose(client, "m", expression="blend*0.5+right", method="ties")
    assert response.json()["config"]["expression"] == "left@1*0.25+right@1*-0.5+right@1"


async def test_the_same_bytes_under_two_names_are_one_part(
    client: httpx.AsyncClient, library: Library, store: AdapterStore
) -> None:
    """Their weights are summed, as everywhere."""
    await upload(client, "left", 1)
    await upload(client, "copy", 1)
    pinned = library.pin(parse("left*0.5+copy*0.25"))
    adapters = [(store.load(digest), weight) for digest, weight in combine(pinned.parts)]
    pinned.release()
    assert [weight for _, weight in adapters] == [0.75]
    assert (
        merge(adapters, Recipe("ties", 0.5)).digest == merge([(adapters[0][0], 0.75)], Recipe("ties", 0.5)).digest
    )
    assert (await compose(client, "m", expression="left*0.5+copy*-0.5", method="ties")).status_code == 422
