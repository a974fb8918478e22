"""The audit list: who did what, when, by which request and from which address; refused attempts, too."""

import json
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from adapters.errors import Conflict
from adapters.names import Viewpoint
from server.access.audit import Audit
from server.access.principal import OPERATOR, Quota
from server.access.tables import audit
from server.access.usage import Usage
from server.api.authentication import Sender
from server.api.refusals import LEFT_OUT, MAX_ENTRIES, Refusals
from server.jobs.jobs import retire_jobs
from server.jobs.leases import Leases
from server.training.spec import JobSpec
from tests.server.api.access.key_kit import OPERATORS, access_of, client_with, new_secret, two_projects
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import until
from tests.server.api.train_kit import ROWS, StandIn, submit, train_body
from tests.server.conftest import MakeServices, new_app

pytestmark = pytest.mark.anyio

CONTENT = "\n".join(map(json.dumps, ROWS)).encode()


async def entries(client: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    response = await client.get("/audit", params={"limit": "1000", **query})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["entries"]
    return found[::-1]


async def test_every_action_is_listed_with_its_request(app: FastAPI, leases: Leases) -> None:
    async with two_projects(app) as projects:
        acme, operator = projects.acme, projects.operator
        await acme.post("/adapters/tweets", files=as_parts(*peft_files()))
        await acme.get("/adapters/tweets/1/download")
        await acme.post("/compositions/half", json={"expression": "tweets*0.5"})
        await acme.post("/compositions/half", json={"expression": "tweets*0.5"})  # no new version
        dataset = (await acme.post("/datasets", files={"file": ("a.jsonl", CONTENT)})).json()["id"]
        file = (
            await acme.post("/v1/files", files={"file": ("a.jsonl", CONTENT)}, data={"purpose": "fine-tune"})
        ).json()["id"]
        await acme.get(f"/v1/files/{file}/content")
        job = await submit(acme)
        await acme.post(f"/train/{job}/pause")
        await acme.post(f"/train/{job}/resume")
        Context().run(lambda: StandIn(leases).succeed(digest="ab" * 32))  # no request is being handled
        headers = {"X-Request-Id": "cancelling-1"}
        second = await submit(acme, name="other")
        assert (await operator.post(f"/train/{second}/cancel", headers=headers)).status_code == 200
        assert (await operator.post(f"/train/{second}/cancel")).status_code == 409  # nothing was done
        evaluated = {"adapters": ["base"], "datasets": [dataset]}
        third = (await acme.post("/evaluate", json=evaluated)).json()["id"]
        await acme.post(f"/evaluate/{third}/cancel")
        await acme.delete(f"/datasets/{dataset}")
        found = await entries(operator, project="acme")
        assert [(entry["action"], entry["target"]) for entry in found] == [
            ("key.create", found[0]["target"]),
            ("adapter.upload", "tweets@1"),
            ("adapter.download", "tweets@1"),
            ("adapter.compose", "half@1"),
            ("dataset.upload", dataset),
            ("file.upload", file),
            ("file.download", file),
            ("job.submit", job),
            ("job.pause", job),
            ("job.resume", job),
            ("job.publish", "codes@1"),
            ("job.submit", second),
            ("job.cancel", second),
            ("job.submit", third),
            ("job.cancel", third),
            ("dataset.delete", dataset),
        ]
        (key,) = await entries(operator, action="key.create", project="acme")
        (operators,) = await entries(operator, action="key.create", project="default")
        by_action = {entry["action"]: entry for entry in found}
        assert by_action["adapter.upload"]["who"] == by_action["job.publish"]["who"] == key["target"]
        published = by_action["job.publish"]
        assert published["detail"] == {"job": job, "digest": "ab" * 32, "alias": None, "moves_latest": True}
        assert (published["address"], published["request_id"]) == (None, None)
        cancelled = next(entry for entry in found if entry["target"] == second and entry["action"] == "job.cancel")
        assert (cancelled["who"], cancelled["request_id"]) == (operators["target"], "cancelling-1")
        assert cancelled["address"] == "127.0.0.1"
        assert by_action["job.submit"]["detail"]["kind"] == "evaluate"


async def test_filters_select_entries(app: FastAPI) -> None:
    async with two_projects(app) as projects:
        for client in (projects.acme, projects.other):
            await client.post("/adapters/tweets", files=as_parts(*peft_files()))
        operator = projects.operator
        (upload,) = await entries(operator, action="adapter.upload", project="other")
        assert upload["project"] == "other"
        assert await entries(operator, who=upload["who"]) == [upload]
        everything = await entries(operator)
        now = datetime.now(UTC)
        for since, number in (
            (now - timedelta(days=1), len(everything)),
            (now + timedelta(days=1), 0),
        ):
            assert len(await entries(operator, **{"from": since.date().isoformat()})) == number
            assert len(await entries(operator, **{"from": since.isoformat()})) == number
        assert await entries(operator, **{"from": upload["at"]}) == [upload]
        assert await entries(operator, action="nothing") == []
        page = (await operator.get("/audit?limit=1&action=adapter.upload")).json()
        (older,) = await entries(operator, action="adapter.upload", after=str(page["next"]))
        assert (older["project"], page["entries"]) == ("acme", [upload])
        for wrong in ("yesterday", "2026-01-31T12:00:00", "0", "9999-99-99"):
            assert (await operator.get("/audit", params={"from": wrong})).status_code == 422, wrong


async def test_refused_attempts_are_listed(app: FastAPI) -> None:
    async with two_projects(app) as projects:
        operator, acme = projects.operator, projects.acme
        key, secret = access_of(app).keys.create("gone", who=OPERATOR, project="acme")
        access_of(app).keys.revoke(key.id, who=OPERATOR)
        for _ in range(3):
            assert (await acme.get("/projects")).status_code == 403
        async with client_with(app, secret) as gone, client_with(app, "sk-smolora-wrong") as wrong:
            assert (await gone.get("/adapters/tweets")).status_code == 401
            assert (await wrong.get("/adapters/tweets")).status_code == 401
            del wrong.headers["Authorization"]
            assert (await wrong.delete("/adapters/tweets")).status_code == 401
        assert (await acme.post("/train", json=train_body(), headers={"Host": "evil.example"})).status_code == 403
        found = await entries(operator, action="refused")
        who = next(one["id"] for one in (await operator.get("/keys?project=acme")).json()["keys"])
        assert [
            (entry["who"], entry["project"], entry["target"], entry["detail"]["status"]) for entry in found
        ] == [
            (who, "acme", "GET /projects", 403),
            (key.id, "acme", "GET /adapters/{name}", 401),
            ("unknown", "", "GET /adapters/{name}", 401),
            ("anonymous", "", "DELETE /adapters/{name}", 401),
            ("anonymous", "", "POST /train", 403),
        ]
        assert {entry["address"] for entry in found} == {"127.0.0.1"}
        async with client_with(app, new_secret(app, "acme", ["manage"])) as manager:
            assert {entry["who"] for entry in await entries(manager, action="refused")} == {who, key.id}


async def test_managers_see_neither_the_operators_keys_nor_its_addresses(
    make_services: MakeServices,
) -> None:
    app = new_app(make_services(api_keys=OPERATORS))
    new_secret(app, scopes=["metrics"])
    _, secret = access_of(app).keys.create("lead", who=OPERATOR, scopes=["manage"])
    async with (
        client_with(app, new_secret(app, scopes=["admin"])) as operator,
        client_with(app, OPERATORS) as of_setting,
        client_with(app, secret) as manager,
    ):
        own = (await manager.post("/keys", json={"name": "ci"})).json()["id"]
        for client in (operator, of_setting):
            for jobs in (1, None):
                assert (await client.patch(f"/keys/{own}", json={"max_jobs": jobs})).status_code == 200
        everything, seen = await entries(operator, project="default"), await entries(manager)
        lead = next(entry["who"] for entry in everything if entry["target"] == own)
        assert [(entry["who"], entry["action"], entry["target"]) for entry in seen] == [
            ("operator", "key.create", lead),
            (lead, "key.create", own),
            *[("operator", "key.change", own)] * 4,
        ]
        assert {entry["number"] for entry in seen} < {entry["number"] for entry in everything}
        for entry in seen:
            is_own = entry["who"] == lead
            assert (entry["address"] is not None, entry["request_id"] is not None) == (is_own, is_own)
        assert await entries(manager, who="operator") == [entry for entry in seen if entry["who"] == "operator"]
        for who in {entry["who"] for entry in everything} - {lead}:
            assert await entries(manager, who=who) == [], "it doesn't learn the operator's keys by asking"


async def test_used_up_quotas_are_not_refused_attempts(app: FastAPI) -> None:
    cases: list[tuple[Quota, str, dict[str, Any]]] = [
        (Quota(max_bytes=1), "/adapters/a", {"files": as_parts(*peft_files())}),
        (Quota(max_versions=0), "/adapters/a", {"files": as_parts(*peft_files())}),
        (Quota(allow_full=False), "/train", {"json": train_body(method="full")}),
    ]
    for limits, path, body in cases:
        async with client_with(app, new_secret(app, "acme", quota=limits)) as client:
            assert (await client.post(path, **body)).status_code == 403
    assert access_of(app).audit.list(100, action="refused") == []


async def test_floods_of_refused_attempts_are_bounded(app: FastAPI) -> None:
    """Clients without a valid key can't fill the list, or keep a key's own attempts off it."""
    audit, times = Audit(access_of(app).audit._engine), [0.0]
    refusals = Refusals(audit, lambda: times[0])
    for number in range(2 * MAX_ENTRIES):
        await refusals.add(Sender("unknown"), f"10.0.0.{number}", "GET", "/adapters", 401)
    for _ in range(5):
        await refusals.add(Sender("key-1", "acme", has_key=True), "10.0.0.1", "GET", "/keys", 403)
    assert len(audit.list(1000, who="unknown")) == MAX_ENTRIES
    (entry,) = audit.list(1000, who="key-1")
    assert (entry.target, entry.detail) == ("GET /keys", {"status": 403})
    for minute in (1, 2):  # what was left out is written once
        times[0] = 60.0 * minute
        await refusals.add(Sender("key-1", "acme", has_key=True), "10.0.0.1", "GET", "/keys", 403)
    newest = audit.list(4)
    assert [(entry.who, entry.project, entry.target, entry.detail) for entry in newest] == [
        ("key-1", "acme", "GET /keys", {"status": 403}),
        ("key-1", "acme", "GET /keys", {"status": 403}),
        ("key-1", "acme", LEFT_OUT, {"left_out": 4}),
        ("unknown", "", LEFT_OUT, {"left_out": MAX_ENTRIES}),
    ]


async def test_a_refused_attempts_size_is_bounded_whatever_its_method_and_address(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolora.api")
    async with two_projects(app) as projects, client_with(app, "sk-smolora-wrong") as wrong:
        assert (await wrong.request("X" * 60_000, "/adapters")).status_code == 401
        assert len(caplog.records[-1].getMessage()) < 1000
        (entry,) = await entries(projects.operator, action="refused")
        assert entry["target"] == "other /adapters"
    audit = access_of(app).audit
    refusals = Refusals(audit)
    for number in range(9):  # one client has a whole /64
        await refusals.add(Sender("unknown"), f"2001:db8::{number}", "GET", "/keys", 401)
    assert [entry.target for entry in audit.list(9, who="unknown")].count("GET /keys") == 1


async def test_a_job_and_its_projects_deletion_exclude_each_other(app: FastAPI) -> None:
    """Neither a job that is submitted during a deletion nor one submitted after it ends up without its project."""
    projects, jobs = access_of(app).projects, app.state.services.jobs.of(Viewpoint("acme"))

    records = app.state.services.storage.records()

    def submit_job(job_id: str = "job-1") -> None:
        jobs.submit(JobSpec("codes"), job_id=job_id, data={})

    projects.put("acme", Quota(), who=OPERATOR)
    with pytest.raises(Conflict, match="acme has unfinished jobs: cancel them first"):
        projects.delete("acme", submit_job, retire_jobs, records, who=OPERATOR)
    assert (projects.get("acme").name, jobs.get("job-1").project) == ("acme", "acme")
    jobs.cancel("job-1")
    projects.delete("acme", lambda: None, retire_jobs, records, who=OPERATOR)
    with pytest.raises(Conflict, match="the project acme was deleted"):
        submit_job("job-2")
    assert jobs.list() == []


async def test_a_new_project_of_a_deleted_ones_name_starts_empty(app: FastAPI, leases: Leases) -> None:
    async with two_projects(app) as projects:
        acme, operator = projects.acme, projects.operator
        generated = await acme.post("/generate", json={"prompt": "a", "max_tokens": 4})
        num_tokens = generated.json()["usage"]["prompt_tokens"]
        keys = (await operator.get("/keys?project=acme")).json()["keys"]
        await acme.post("/adapters/codes", files=as_parts(*peft_files()))
        once = {"Idempotency-Key": "once"}
        job = (await acme.post("/train", json=train_body(description="confidential"), headers=once)).json()["id"]
        StandIn(leases).succeed(digest="ab" * 32)
        for version in (1, 2):
            assert (await acme.delete(f"/adapters/codes/{version}")).status_code == 204
        assert (await operator.delete("/projects/acme")).status_code == 204
        (deleted,) = await entries(operator, action="project.delete")
        history = deleted["detail"]["history"]
        assert history.startswith("acme~")
        app.state.services.library.recover()  # as the next start does
        async with (
            client_with(app, new_secret(app, "acme")) as reborn,
            client_with(app, new_secret(app, "acme", ["manage"])) as manager,
        ):
            assert (await reborn.get("/train")).json()["jobs"] == []
            for path in (f"/train/{job}", f"/train/{job}/events", f"/train/{job}/report"):
                assert (await reborn.get(path)).status_code == 404, path
            assert (await reborn.get("/usage?by=key")).json()["rows"] == []
            assert len((await manager.get("/keys")).json()["keys"]) == 2
            assert {entry["action"] for entry in await entries(manager)} == {"key.create"}
            fresh = await reborn.post("/train", json=train_body(description="another"), headers=once)
            assert fresh.status_code == 202
            assert fresh.json()["id"] != job
            uploaded = await reborn.post("/adapters/codes", files=as_parts(*peft_files()))
            assert uploaded.json()["version"] == 1
            # An answer of a deleted project's key ends: its usage isn't the new project's.
            access_of(app).ledger.add("acme", keys[0]["id"], "base", Usage(requests=1, prompt_tokens=7))
            assert (await reborn.get("/usage?by=key")).json()["rows"] == []
        # The operator still sees all of it, under the other name.
        assert (await operator.get(f"/train/{job}")).json()["project"] == history
        assert "adapter.upload" in {entry["action"] for entry in await entries(operator, project=history)}
        by_project = (await operator.get("/usage?by=project")).json()["rows"]
        assert {row["project"]: row["prompt_tokens"] for row in by_project}[history] == num_tokens + 7
        assert {key["project"] for key in (await operator.get("/keys")).json()["keys"]} >= {history, "acme"}


async def test_old_entries_are_removed_if_that_is_set(
    app: FastAPI, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.access.audit._PRUNED_AT_ONCE", 2)
    access, now = access_of(app), datetime.now(UTC)
    for number in range(5):
        access.audit.add(OPERATOR, "old", "default", str(number))
    with database.begin() as connection:
        connection.execute(sa.update(audit).values(at=now - timedelta(days=8)))
    access.audit.add(OPERATOR, "new", "default", "5")
    assert access.audit.prune(now - timedelta(days=9)) == 0
    assert access.audit.prune(now - timedelta(days=7)) == 5
    assert [entry.target for entry in access.audit.list(10)] == ["5"]


async def test_the_server_removes_old_entries(make_services: MakeServices) -> None:
    app = new_app(make_services(retain_audit=1e-9))
    access = access_of(app)
    access.audit.add(OPERATOR, "old", "default", "0")
    async with app.router.lifespan_context(app):
        await until(lambda: not access.audit.list(1))
