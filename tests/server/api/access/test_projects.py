"""Mutually distrusting projects: another project's objects look as if they didn't exist, for any request."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.principal import Quota
from server.api.openapi import App
from server.api.routes import ADMIN, MANAGE
from server.jobs.leases import Leases
from tests.server.api.access.key_kit import Projects, client_with, new_secret, two_projects
from tests.server.api.access.test_scopes import operations, wanted
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS, StandIn, submit, train_body

pytestmark = pytest.mark.anyio

CONTENT = "\n".join(map(json.dumps, ROWS)).encode()
PURPOSE = {"purpose": "fine-tune"}
OWN_NAMES = {"POST /adapters/{name}", "POST /adapters/{name}/import", "POST /compositions/{name}"}
"""Parameters whose objects are created by name, in the client's own project."""


@pytest.fixture
async def projects(app: FastAPI) -> AsyncIterator[Projects]:
    async with two_projects(app) as projects:
        yield projects


async def upload(client: httpx.AsyncClient, name: str = "tweets", seed: int = 0) -> dict[str, Any]:
    response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed)))
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


async def everything(client: httpx.AsyncClient, leases: Leases) -> dict[str, str]:
    """Create one of each kind of object of a project; return them by path parameter."""
    await upload(client)
    await client.put("/adapters/tweets/aliases/prod", json={"version": 1})
    dataset = (await client.post("/datasets", files={"file": ("a.jsonl", CONTENT)})).json()["id"]
    file = (await client.post("/v1/files", files={"file": ("a.jsonl", CONTENT)}, data=PURPOSE)).json()["id"]
    tuning = {"model": "base", "training_file": file}
    job = (await client.post("/v1/fine_tuning/jobs", json=tuning)).json()["id"]
    StandIn(leases).succeed()
    values = {"name": "tweets", "version": "1", "alias": "prod", "model": "tweets", "job_id": job}
    return values | {"dataset_id": dataset, "file_id": file}


async def test_other_projects_objects_are_404(projects: Projects, leases: Leases, app: App) -> None:
    """Every route with an id or a name in its path answers as for an object that doesn't exist."""
    theirs = await everything(projects.acme, leases)
    nothing = {"name": "nobody", "version": "1", "alias": "none", "model": "nobody", "job_id": "job-" + "0" * 16}
    nothing |= {"dataset_id": "ds-" + "0" * 32, "file_id": "file-" + "0" * 24}
    num_asked = 0
    for method, template in operations(app):
        if (
            "{" not in template
            or f"{method} {template}" in OWN_NAMES
            or wanted(method, template) in (ADMIN, MANAGE)
        ):
            continue
        bodies = {"aliases": {"version": 1}, "visibility": {"visibility": "public"}}
        json_body = next((body for part, body in bodies.items() if part in template), None)
        answers = []
        for values in (theirs, nothing):
            response = await projects.other.request(method, template.format(**values), json=json_body)
            text = re.sub("|".join(map(re.escape, values.values())), "X", response.text)
            answers.append((response.status_code, text))
        assert answers[0] == answers[1], (method, template)
        assert answers[0][0] == 404, (method, template, answers)
        num_asked += 1
    assert num_asked > 20
    for path in (
        "/adapters",
        "/train",
        "/evaluate",
        "/datasets",
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/v1/models",
    ):
        listed = (await projects.other.get(path)).text
        assert not [value for value in theirs.values() if len(value) > 4 and value in listed], path
    assert (await projects.acme.get("/adapters/tweets/1")).status_code == 200  # everything still exists


async def test_names_in_bodies_are_the_projects_own(projects: Projects, leases: Leases) -> None:
    theirs = await everything(projects.acme, leases)
    other = projects.other
    for named in ("tweets", "tweets@1", "tweets@prod", "acme/tweets", "acme/tweets@1*0.5", "default/tweets"):
        for path, body in {
            "/generate": {"prompt": "a", "adapter": named},
            "/compare": {"prompt": "a", "adapters": ["base", named]},
            "/v1/completions": {"model": named, "prompt": "a"},
            "/v1/chat/completions": {"model": named, "messages": [{"role": "user", "content": "a"}]},
            "/compositions/mix": {"expression": named},
            "/train": train_body(start_from=named.removesuffix("*0.5")),
            "/evaluate": {"adapters": ["base", named], "datasets": [theirs["dataset_id"]]},
        }.items():
            response = await other.post(path, json=body)
            assert response.status_code == 404, (path, named, response.text)
            assert "no such" in response.text
    for field in ("dataset", "validation"):
        body = train_body(**{field: theirs["dataset_id"]}, data=None if field == "dataset" else ROWS)
        assert (await other.post("/train", json=body)).status_code == 404
    measured = {"adapters": ["base"], "datasets": [theirs["dataset_id"]]}
    response = await other.post("/evaluate", json=measured)
    assert (response.status_code, "no data set has this id" in response.text) == (404, True)
    assert (await projects.acme.post("/evaluate", json=measured)).status_code == 202
    tuning = {"model": "base", "training_file": theirs["file_id"]}
    response = await other.post("/v1/fine_tuning/jobs", json=tuning)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "training_file"


async def test_names_keys_and_ids_are_a_projects_own(projects: Projects, leases: Leases) -> None:
    mine, theirs = await upload(projects.acme), await upload(projects.other)
    assert (mine["name"], mine["version"], mine["digest"]) == (theirs["name"], theirs["version"], theirs["digest"])
    datasets = [
        (await client.post("/datasets", files={"file": ("a.jsonl", CONTENT)})).json()["id"]
        for client in (projects.acme, projects.other)
    ]
    assert datasets[0] == datasets[1]
    jobs = [
        (await client.post("/train", json=train_body(), headers={"Idempotency-Key": "once"})).json()["id"]
        for client in (projects.acme, projects.acme, projects.other)
    ]
    assert jobs[0] == jobs[1] != jobs[2]
    # Deleting leaves another project's equal bytes.
    assert (await projects.acme.delete("/adapters/tweets")).status_code == 204
    assert (await projects.acme.delete(f"/datasets/{datasets[0]}")).status_code == 204
    answer = await projects.other.post("/generate", json={"prompt": "a", "adapter": "tweets"})
    assert answer.json()["adapters"] == [{"name": "tweets", "version": 1, "digest": mine["digest"], "weight": 1.0}]
    assert (await projects.other.get(f"/datasets/{datasets[0]}")).status_code == 200
    assert (await projects.acme.get(f"/datasets/{datasets[0]}")).status_code == 404


async def test_a_job_publishes_where_it_was_submitted(projects: Projects, leases: Leases) -> None:
    job = await submit(projects.acme)
    StandIn(leases).succeed(digest="ab" * 32)
    ended = (await projects.acme.get(f"/train/{job}")).json()
    assert ended["adapter"] == {"name": "codes", "version": 1, "digest": "ab" * 32, "moves_latest": True}
    assert [adapter["name"] for adapter in (await projects.acme.get("/adapters")).json()["adapters"]] == ["codes"]
    assert (await projects.other.get("/adapters")).json()["adapters"] == []
    assert (await projects.operator.get(f"/train/{job}")).json() == ended


async def test_public_adapters_are_used_by_their_full_name(projects: Projects) -> None:
    made = await upload(projects.acme)
    shared = await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    assert shared.json()["visibility"] == "public"
    listed = (await projects.other.get("/adapters?public=true")).json()["adapters"]
    assert [(adapter["name"], adapter["visibility"]) for adapter in listed] == [("acme/tweets", "public")]
    assert listed[0]["versions"][0]["config"] == {}  # its origin stays in its project
    assert (await projects.other.get("/adapters")).json()["adapters"] == []
    used = {"name": "acme/tweets", "version": 1, "digest": made["digest"]}
    answer = await projects.other.post("/generate", json={"prompt": "a", "adapter": "acme/tweets@1*0.5"})
    assert answer.json()["adapters"] == [{**used, "weight": 0.5}]
    parts = [{"name": "acme/tweets", "weight": 2.0}]
    answer = await projects.other.post("/generate", json={"prompt": "a", "adapters": parts})
    assert answer.json()["adapters"] == [{**used, "weight": 2.0}]
    chat = await projects.other.post("/v1/completions", json={"model": "acme/tweets", "prompt": "a"})
    assert chat.json()["model"] == "acme/tweets@1"
    assert (await projects.other.get("/v1/models/acme/tweets")).json()["id"] == "acme/tweets"
    assert (await projects.acme.get("/adapters?public=true")).json()["adapters"][0]["name"] == "tweets"
    # It may be used but not changed.
    for method, path in (("DELETE", "/v1/models/acme/tweets"), ("DELETE", "/v1/models/acme/tweets@1")):
        assert (await projects.other.request(method, path)).status_code == 404
    assert (await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "private"})).is_success
    assert (
        await projects.other.post("/generate", json={"prompt": "a", "adapter": "acme/tweets"})
    ).status_code == 404
    assert (await projects.other.get("/adapters?public=true")).json()["adapters"] == []


@pytest.mark.parametrize("path", ["acme%2Ftweets", "acme/tweets"])
async def test_full_names_in_paths_get_advice(projects: Projects, path: str) -> None:
    await upload(projects.acme)
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    refused = await projects.other.get(f"/adapters/{path}")
    assert refused.status_code == 422
    (error,) = refused.json()["errors"]
    place = error["message"].rpartition(" is at ")[2].replace("PROJECT/NAME", "acme/tweets")
    (found,) = (await projects.other.get(place)).json()["adapters"]
    assert (found["name"], len(found["versions"])) == ("acme/tweets", 1)


async def test_a_composition_is_public_only_with_its_parts(projects: Projects) -> None:
    acme, public = projects.acme, {"visibility": "public"}
    for seed, name in enumerate(("tweets", "movies")):
        await upload(acme, name, seed)
    assert (await acme.post("/compositions/mix", json={"expression": "tweets*0.5+movies*0.5"})).status_code == 201
    refused = await acme.put("/adapters/mix/visibility", json=public)
    assert refused.status_code == 409
    assert (
        refused.json()["detail"] == "mix can be public only when its parts are: make movies, tweets public first"
    )
    for name in ("tweets", "movies", "mix"):
        assert (await acme.put(f"/adapters/{name}/visibility", json=public)).status_code == 200
    answer = await projects.other.post("/generate", json={"prompt": "a", "adapter": "acme/mix"})
    assert [part["name"] for part in answer.json()["adapters"]] == ["acme/tweets", "acme/movies"]
    (mix,) = (await projects.other.get("/adapters?public=true&name=acme/mix")).json()["adapters"]
    assert [part["name"] for part in mix["parts"]] == ["acme/tweets", "acme/movies"]
    refused = await acme.put("/adapters/tweets/visibility", json={"visibility": "private"})
    assert refused.json()["detail"] == "tweets is a part of public compositions: make mix private first"
    # A later version can't introduce a private part either.
    await upload(acme, "secret", 7)
    assert (await acme.post("/compositions/mix", json={"expression": "secret"})).status_code == 409


async def test_each_holder_of_an_adapter_has_its_own_way_out(projects: Projects) -> None:
    await upload(projects.acme)
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    await projects.acme.post("/compositions/half", json={"expression": "tweets*0.5"})
    await projects.other.post("/compositions/mine", json={"expression": "acme/tweets*0.5"})
    held = (await projects.acme.delete("/adapters/tweets?force=true")).json()["detail"]
    assert held.startswith("held by the composition half@1, 1 composition of other projects: delete the ")
    assert "compositions first; make it private" in held
    await projects.acme.delete("/adapters/half")
    assert (await projects.operator.delete("/v1/models/other/mine")).is_success
    assert (await projects.acme.delete("/adapters/tweets")).status_code == 204


async def test_a_composition_of_anothers_ends_with_their_consent(projects: Projects) -> None:
    await upload(projects.acme)
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    made = await projects.other.post("/compositions/mine", json={"expression": "acme/tweets*0.5"})
    assert made.json()["parent"] == "acme/tweets@1*0.5"
    assert made.json()["parts"][0]["name"] == "acme/tweets"
    held = await projects.acme.delete("/adapters/tweets")
    assert held.status_code == 409
    assert held.json()["detail"] == (
        "held by 1 composition of other projects: make it private, which ends their use, and ask the operator to "
        "delete theirs"
    )
    assert "mine" not in held.json()["detail"]
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "private"})
    refused = await projects.other.post("/generate", json={"prompt": "a", "adapter": "mine"})
    assert refused.status_code == 404
    assert "no longer shares: acme/tweets@1" in refused.json()["detail"]


async def test_adapter_recreated_after_a_public_one_is_private(projects: Projects) -> None:
    await upload(projects.acme)
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    assert (await projects.acme.delete("/adapters/tweets")).status_code == 204
    await upload(projects.acme, seed=1)
    assert (await projects.acme.get("/adapters/tweets")).json()["visibility"] == "private"
    body = {"prompt": "a", "adapter": "acme/tweets"}
    assert (await projects.other.post("/generate", json=body)).status_code == 404


async def test_suggestions_name_own_objects_only(projects: Projects, app: FastAPI) -> None:
    await upload(projects.acme, "customer-support")
    for adapter in ("custmer-support", "acme/custmer-support"):
        body = {"prompt": "a", "adapter": adapter}
        assert "did you mean" not in (await projects.other.post("/generate", json=body)).text
    own = await projects.acme.post("/generate", json={"prompt": "a", "adapter": "custmer-support"})
    assert own.json()["detail"] == "no such adapter: custmer-support (did you mean customer-support?)"
    await projects.acme.put("/adapters/customer-support/visibility", json={"visibility": "public"})
    body = {"prompt": "a", "adapter": "acme/custmer-support"}
    assert "did you mean acme/customer-support?" in (await projects.other.post("/generate", json=body)).text


async def test_the_operator_sees_all_and_may_work_in_one(projects: Projects, leases: Leases) -> None:
    await upload(projects.acme)
    await upload(projects.operator, "mine", 3)
    operator = projects.operator
    listed = (await operator.get("/adapters")).json()["adapters"]
    assert [adapter["name"] for adapter in listed] == ["acme/tweets", "mine"]
    answer = await operator.post("/generate", json={"prompt": "a", "adapter": "acme/tweets"})
    assert answer.json()["adapters"][0]["name"] == "acme/tweets"
    within = {"OpenAI-Project": "acme"}
    assert [a["name"] for a in (await operator.get("/adapters", headers=within)).json()["adapters"]] == ["tweets"]
    assert (await operator.delete("/adapters/tweets", headers=within)).status_code == 204
    assert (await operator.get("/adapters", headers={"OpenAI-Project": "nobody"})).status_code == 404
    refused = await projects.other.get("/adapters", headers=within)
    assert refused.status_code == 403
    assert (await projects.acme.get("/adapters", headers=within)).status_code == 200


async def test_operator_sees_the_project_of_each_job(app: FastAPI, projects: Projects, leases: Leases) -> None:
    theirs = {await submit(projects.acme): "acme", await submit(projects.other): "other"}
    jobs = (await projects.operator.get("/train")).json()["jobs"]
    assert {job["id"]: job["project"] for job in jobs} == theirs
    keys = (await projects.operator.get("/keys")).json()["keys"]
    project_of = {key["id"]: key["project"] for key in keys}
    assert [project_of[job["key"]] for job in jobs] == [job["project"] for job in jobs]


async def test_operators_removals_are_audited_in_the_owners_project(projects: Projects, leases: Leases) -> None:
    await upload(projects.acme)
    await upload(projects.acme, seed=1)
    job = await submit(projects.acme)
    await projects.operator.post(f"/train/{job}/cancel")
    for path in (f"/train/{job}", "/v1/models/acme/tweets@1", "/v1/models/acme/tweets"):
        assert (await projects.operator.delete(path)).is_success
    entries = (await projects.operator.get("/audit?limit=3")).json()["entries"]
    assert [(entry["action"], entry["project"], entry["target"]) for entry in reversed(entries)] == [
        ("job.delete", "acme", job),
        ("adapter.delete", "acme", "tweets@1"),
        ("adapter.delete", "acme", "tweets"),
    ]


async def test_queued_jobs_of_projects_take_turns(projects: Projects, leases: Leases) -> None:
    acme = [await submit(projects.acme) for _ in range(4)]
    other = [await submit(projects.other) for _ in range(2)]
    order = []
    for _ in range(6):
        stand_in = StandIn(leases)
        order.append(stand_in.claim.job_id)
        stand_in.succeed()
    rounds = [set(order[:2]), set(order[2:4]), *order[4:]]  # within a round the faster project may be first
    assert rounds == [{acme[0], other[0]}, {acme[1], other[1]}, acme[2], acme[3]]


async def test_positions_include_other_projects_turns(projects: Projects, leases: Leases) -> None:
    """A job behind another project's running job, which may take days, isn't first."""

    async def position(job_id: str) -> object:
        return (await projects.other.get(f"/train/{job_id}")).json()["position"]

    await submit(projects.acme)
    StandIn(leases)
    jobs = [await submit(projects.other) for _ in range(2)]
    assert [await position(job_id) for job_id in jobs] == [2, 3]


async def test_jobs_at_once_and_rates_hold_for_key_and_project(app: FastAPI, projects: Projects) -> None:
    operator = projects.operator
    await operator.put("/projects/acme", json={"max_jobs": 1})
    first = await submit(projects.acme)
    async with client_with(app, new_secret(app, "acme")) as colleague:
        refused = await colleague.post("/train", json=train_body())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"] == "this project has 1 unfinished job, and may have 1 at once"
        await colleague.post(f"/train/{first}/cancel")
        await submit(colleague)
    await submit(projects.other)


async def test_jobs_at_once_hold_for_a_key_of_a_project_without_a_bound(app: FastAPI, projects: Projects) -> None:
    async with client_with(app, new_secret(app, "acme", quota=Quota(max_jobs=1))) as bounded:
        await submit(bounded)
        refused = await bounded.post("/train", json=train_body())
    assert refused.status_code == 429
    assert refused.json()["detail"] == "this key has 1 unfinished job, and may have 1 at once"
    await submit(projects.acme)


async def test_event_stream_of_another_project_is_404(projects: Projects) -> None:
    job = await submit(projects.acme)
    headers = {"Accept": "text/event-stream"}
    async with asyncio.timeout(60):
        assert (await projects.other.get(f"/train/{job}/events", headers=headers)).status_code == 404


async def test_jobs_on_a_public_adapter_are_its_owners_alone_to_know(projects: Projects) -> None:
    """A project that may not delete it gets the same answer, whether a job needs it or not."""
    assert (await projects.acme.post("/adapters/tweets", files=as_parts(*peft_files()))).status_code == 201
    await projects.acme.put("/adapters/tweets/visibility", json={"visibility": "public"})
    before = [await projects.other.delete(f"/v1/models/acme/tweets{end}") for end in ("", "@1")]
    job = await projects.acme.post("/train", json=train_body(name="secret", start_from="tweets", lora=None))
    assert job.status_code == 202, job.text
    after = [await projects.other.delete(f"/v1/models/acme/tweets{end}") for end in ("", "@1")]
    assert [(r.status_code, r.text) for r in after] == [(r.status_code, r.text) for r in before]
    assert {r.status_code for r in after} == {404}
    assert (await projects.acme.delete("/adapters/tweets")).status_code == 409
