"""Managers: they administer their own project's keys and limits, and gain nothing beyond them."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from server.access.principal import OPERATOR, Principal, Quota
from server.access.tables import api_keys
from server.errors import Forbidden
from tests.server.api.access.key_kit import Projects, access_of, client_with, new_secret, two_projects

pytestmark = pytest.mark.anyio


@pytest.fixture
async def projects(app: FastAPI) -> AsyncIterator[Projects]:
    async with two_projects(app) as projects:
        yield projects


@pytest.fixture
async def manager(app: FastAPI, projects: Projects) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client with a key that manages acme, and can do nothing else."""
    async with client_with(app, new_secret(app, "acme", ["manage"])) as manager:
        yield manager


async def keys_of(client: httpx.AsyncClient, query: str = "") -> list[dict[str, Any]]:
    response = await client.get(f"/keys{query}")
    assert response.status_code == 200, response.text
    keys: list[dict[str, Any]] = response.json()["keys"]
    return keys


async def test_a_manager_makes_lists_and_revokes_its_projects_keys(
    app: FastAPI, manager: httpx.AsyncClient
) -> None:
    made = await manager.post("/keys", json={"name": "ci"})
    assert (made.status_code, made.json()["project"]) == (201, "acme")
    assert {key["project"] for key in await keys_of(manager)} == {"acme"}
    assert await keys_of(manager, "?project=acme") == await keys_of(manager)
    path = f"/keys/{made.json()['id']}"
    assert (await manager.get(path)).json() == {k: v for k, v in made.json().items() if k != "secret"}
    async with client_with(app, made.json()["secret"]) as client:
        assert (await client.get("/adapters")).status_code == 200
        assert (await client.get("/keys")).status_code == 403
        assert (await manager.delete(path)).status_code == 200
        assert (await client.get("/adapters")).status_code == 401
    assert (await manager.get("/adapters")).status_code == 403  # it manages, and does nothing else
    assert (await manager.get("/usage")).status_code == 200


async def test_other_projects_and_the_operators_keys_seem_not_to_exist(
    app: FastAPI, projects: Projects, manager: httpx.AsyncClient
) -> None:
    theirs = next(key["id"] for key in await keys_of(projects.operator) if key["project"] == "other")
    async with client_with(app, new_secret(app, scopes=["manage"])) as of_default:
        operators = [key["id"] for key in await keys_of(projects.operator) if "admin" in key["scopes"]]
        assert [key["scopes"] for key in await keys_of(of_default)] == [["manage"]]
        for scope in ("admin", "metrics"):
            refused = await of_default.post("/keys", json={"name": "more", "scopes": [scope]})
            assert (refused.status_code, refused.json()["detail"]) == (
                403,
                f"scopes: only the operator can give {scope}",
            )
        for client, key_id in ((manager, theirs), *((of_default, key_id) for key_id in operators)):
            for method, body in (("GET", None), ("PATCH", {"name": "mine"}), ("DELETE", None)):
                answer = await client.request(method, f"/keys/{key_id}", json=body)
                missing = await client.request(method, "/keys/key-0", json=body)
                assert answer.status_code == missing.status_code == 404, (method, answer.text)
                assert answer.text.replace(key_id, "key-0") == missing.text
    for method, path in (
        ("GET", "/projects/other"),
        ("PATCH", "/projects/other"),
        ("GET", "/keys?project=other"),
        ("GET", "/audit?project=other"),
    ):
        body = {} if method == "PATCH" else None
        assert (await manager.request(method, path, json=body)).status_code == 404, path
    assert [project["name"] for project in (await manager.get("/projects")).json()["projects"]] == ["acme"]
    for method in ("PUT", "DELETE"):
        body = {} if method == "PUT" else None
        assert (await manager.request(method, "/projects/acme", json=body)).status_code == 403
    assert (await manager.get("/keys", headers={"OpenAI-Project": "other"})).status_code == 403


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"scopes": ["admin"]}, 422),  # not even the operator gives it to acme
        ({"scopes": ["generate", "metrics"]}, 422),
        ({"project": "other"}, 403),
        ({"project": "new"}, 403),
        ({"project": "default", "scopes": ["admin"]}, 403),
        ({"scopes": ["manage"], "max_jobs": 1}, 422),
        ({"max_jobs": 5}, 422),  # the project's is 4
        ({"max_jobs": 4}, 201),
        ({"max_bytes": 5}, 201),
        ({"allow_full": True}, 422),
        ({"allow_full": False, "max_job_seconds": 9}, 201),
        ({"scopes": ["generate", "train", "manage"]}, 201),
    ],
)
async def test_what_a_manager_can_give(
    app: FastAPI, manager: httpx.AsyncClient, body: dict[str, object], status: int
) -> None:
    access_of(app).projects.put("acme", Quota(max_jobs=4, allow_full=False), who=OPERATOR)
    response = await manager.post("/keys", json={"name": "one", **body})
    assert response.status_code == status, response.text
    assert [project.name for project in access_of(app).projects.list()] == ["acme", "default", "other"]
    # the same by changing a key that it has made
    if "project" not in body:
        key = (await manager.post("/keys", json={"name": "two"})).json()
        changed = await manager.patch(f"/keys/{key['id']}", json=body)
        assert changed.status_code == (200 if status == 201 else status), changed.text


async def test_a_manager_cannot_outlive_its_own_expiry(app: FastAPI, projects: Projects) -> None:
    ends = datetime.now(UTC) + timedelta(days=1)
    key, secret = access_of(app).keys.create(
        "short", who=OPERATOR, project="acme", scopes=["generate", "manage"], expires_at=ends
    )
    async with client_with(app, secret) as manager:
        for later in (None, (ends + timedelta(seconds=1)).isoformat()):
            refused = await manager.post("/keys", json={"name": "long", "expires_at": later})
            assert refused.status_code == 422
            assert refused.json()["errors"][0]["loc"] == ["expires_at"]
            assert (await manager.patch(f"/keys/{key.id}", json={"expires_at": later})).status_code == 422
        endless = next(one["id"] for one in await keys_of(manager) if one["expires_at"] is None)
        assert (await manager.patch(f"/keys/{endless}", json={"scopes": ["manage"]})).status_code == 422
        later = (ends + timedelta(days=9)).isoformat()
        for less in ({"max_jobs": 2}, {"scopes": ["generate"]}, {"expires_at": later}):  # these take from the key
            assert (await manager.patch(f"/keys/{endless}", json=less)).status_code == 200
        for more in ({"scopes": ["generate", "train"]}, {"expires_at": None}):
            assert (await manager.patch(f"/keys/{endless}", json=more)).status_code == 422
        made = await manager.post("/keys", json={"name": "fits", "expires_at": ends.isoformat()})
        assert made.status_code == 201


async def test_a_manager_moves_limits_below_the_operators(
    app: FastAPI, projects: Projects, manager: httpx.AsyncClient
) -> None:
    operator = projects.operator
    await operator.put("/projects/acme", json={"max_jobs": 4, "requests_per_minute": 100})

    async def change(client: httpx.AsyncClient, **limits: int | None) -> dict[str, Any] | int:
        response = await client.patch("/projects/acme", json=limits)
        found: dict[str, Any] = response.json()
        return found if response.status_code == 200 else response.status_code

    async def limits(client: httpx.AsyncClient, **changes: int | None) -> tuple[object, object, object]:
        found = await change(client, **changes)
        assert isinstance(found, dict)
        return found["max_jobs"], found["requests_per_minute"], found["max_bytes"]

    assert await limits(manager, max_jobs=2) == (2, 100, None)
    assert await limits(manager, max_bytes=7) == (2, 100, 7)
    assert await change(manager, max_jobs=5) == 422
    assert await limits(manager, max_jobs=3) == (3, 100, 7)  # up to the operator's 4
    assert await limits(manager, max_jobs=None, max_bytes=None) == (4, 100, None)  # the operator's again
    assert await limits(manager, max_jobs=1) == (1, 100, None)
    assert await limits(operator, requests_per_minute=50) == (1, 50, None)
    assert await change(manager, requests_per_minute=51) == 422
    assert await limits(operator, max_jobs=9) == (9, 50, None)
    assert await limits(manager, max_jobs=9) == (9, 50, None)
    assert await change(manager, max_jobs=10) == 422
    replaced = await operator.put("/projects/acme", json={"max_jobs": 2})
    assert replaced.json()["requests_per_minute"] is None
    assert await limits(manager, max_jobs=None) == (2, None, None)
    assert (await operator.patch("/projects/nobody", json={})).status_code == 404


async def test_a_manager_of_default_cannot_lock_the_operator_out(app: FastAPI, projects: Projects) -> None:
    operator = projects.operator
    access_of(app).projects.put("default", Quota(), who=OPERATOR)
    async with client_with(app, new_secret(app, scopes=["manage", "generate"])) as manager:
        limits = {"requests_per_minute": 1}
        assert (await manager.patch("/projects/default", json=limits)).status_code == 200
        for status in (200, 429):
            assert (await manager.patch("/projects/default", json=limits)).status_code == status
        key = next(key["id"] for key in await keys_of(operator) if key["scopes"] == ["generate", "manage"])
        assert (await operator.post("/generate", json={"prompt": "a", "max_tokens": 1})).status_code == 429
        assert (await operator.delete(f"/keys/{key}")).status_code == 200
        lifted = await operator.patch("/projects/default", json={"requests_per_minute": None})
        assert (lifted.status_code, lifted.json()["requests_per_minute"]) == (200, None)
        assert (await manager.get("/keys")).status_code == 401


async def test_only_the_fields_given_change(app: FastAPI, projects: Projects) -> None:
    operator = projects.operator
    body = {"name": "ci", "project": "acme", "max_jobs": 3, "expires_at": "2999-01-01T00:00:00Z"}
    made = (await operator.post("/keys", json=body)).json()
    secret, path = made.pop("secret"), f"/keys/{made['id']}"
    for change in ({"max_jobs": None}, {"name": "cd"}, {"scopes": ["generate"]}, {"expires_at": None}, {}):
        answer = await operator.patch(path, json=change)
        made |= change
        assert (answer.status_code, answer.json()) == (200, made)
        assert (await operator.get(path)).json() == made
    async with client_with(app, secret) as client:
        assert (await client.get("/adapters")).status_code == 200
        assert (await client.get("/train")).status_code == 403  # the scope `train` is gone
        faults: list[dict[str, object]] = [
            {"name": None},
            {"name": "a b"},
            {"scopes": []},
            {"scopes": None},
            {"project": "other"},
        ]
        for wrong in faults:
            assert (await operator.patch(path, json=wrong)).status_code == 422, wrong
        await operator.delete(path)
        refused = await operator.patch(path, json={"name": "again"})
        assert (refused.status_code, "permanently revoked" in refused.json()["detail"]) == (409, True)
        assert (await client.get("/adapters")).status_code == 401


async def test_admin_is_for_keys_of_the_default_project_alone(projects: Projects) -> None:
    refused = await projects.operator.post("/keys", json={"name": "a", "project": "acme", "scopes": ["admin"]})
    assert refused.status_code == 422
    assert refused.json()["errors"] == [
        {
            "loc": ["scopes"],
            "message": "admin is for keys of the project default alone; give manage to administer one project",
        }
    ]
    within = {"OpenAI-Project": "acme"}
    refused = await projects.operator.post("/keys", json={"name": "a", "scopes": ["admin"]}, headers=within)
    assert refused.status_code == 422
    theirs = next(key["id"] for key in await keys_of(projects.operator) if key["project"] == "acme")
    assert (await projects.operator.patch(f"/keys/{theirs}", json={"scopes": ["admin"]})).status_code == 422


@pytest.mark.parametrize("loss", ["revoked", "expired", "scopes"])
async def test_a_request_in_flight_does_nothing_once_its_managers_key_is_lost(app: FastAPI, loss: str) -> None:
    """The request was admitted before the key was revoked, say, and its transaction begins after it."""
    keys, projects = access_of(app).keys, access_of(app).projects
    key, _ = keys.create("lead", who=OPERATOR, project="acme", scopes=["generate", "manage"])
    other, _ = keys.create("ci", who=OPERATOR, project="acme")
    manager = Principal("acme", key.id, frozenset(key.scopes))
    match loss:
        case "revoked":
            keys.revoke(key.id, who=OPERATOR)
        case "expired":
            expired = sa.update(api_keys).where(api_keys.c.id == key.id)
            with keys._engine.begin() as connection:
                connection.execute(expired.values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
        case _:
            keys.change(key.id, {"scopes": ["generate"]}, who=OPERATOR)
    before = keys.list(), projects.list(), access_of(app).audit.list(100)
    requests: list[Callable[[], object]] = [
        lambda: keys.create("more", who=key.id, project="acme", manager=manager),
        lambda: keys.change(other.id, {"name": "mine"}, who=key.id, manager=manager),
        lambda: keys.change(key.id, {"scopes": ["manage"]}, who=key.id, manager=manager),
        lambda: keys.revoke(other.id, who=key.id, manager=manager),
        lambda: projects.change("acme", {"max_jobs": 1}, who=key.id, manager=manager),
    ]
    for request in requests:
        with pytest.raises(Forbidden):
            request()
    assert (keys.list(), projects.list(), access_of(app).audit.list(100)) == before


async def test_managers_make_a_bounded_number_of_keys(
    projects: Projects, manager: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.access.keys.MAX_MANAGED", 4)  # the project has two
    for _ in range(2):
        made = await manager.post("/keys", json={"name": "one"})
        assert (await manager.delete(f"/keys/{made.json()['id']}")).status_code == 200
    refused = await manager.post("/keys", json={"name": "one"})
    assert (refused.status_code, "ask the operator" in refused.json()["detail"]) == (403, True)
    assert (await projects.operator.post("/keys", json={"name": "one", "project": "acme"})).status_code == 201


async def test_a_change_to_the_same_values_is_not_recorded(
    app: FastAPI, projects: Projects, manager: httpx.AsyncClient
) -> None:
    await projects.operator.put("/projects/acme", json={"max_jobs": 4})
    body = {"name": "ci", "scopes": ["train"], "max_jobs": 2, "expires_at": "2999-01-01T00:00:00Z"}
    key = (await projects.operator.post("/keys", json={**body, "project": "acme"})).json()
    assert (await manager.patch("/projects/acme", json={"max_jobs": 3})).status_code == 200
    entries, number = access_of(app).audit.list(100), access_of(app).ring._changes()
    for client in (projects.operator, manager):
        for same in ({}, body):
            assert (await client.patch(f"/keys/{key['id']}", json=same)).status_code == 200
        assert (await client.patch("/projects/acme", json={})).status_code == 200
    assert (await manager.patch("/projects/acme", json={"max_jobs": 3})).status_code == 200
    assert (access_of(app).audit.list(100), access_of(app).ring._changes()) == (entries, number)
    assert (await projects.operator.patch("/projects/acme", json={"max_jobs": 3})).status_code == 200
    assert (await manager.patch("/projects/acme", json={"max_jobs": 4})).status_code == 422, "the operator's is 3"


async def test_changes_of_keys_and_limits_are_audited(projects: Projects, manager: httpx.AsyncClient) -> None:
    key = (await manager.post("/keys", json={"name": "ci", "max_jobs": 2})).json()
    await manager.patch(f"/keys/{key['id']}", json={"max_jobs": 1, "scopes": ["train"]})
    await manager.patch("/projects/acme", json={"max_bytes": 9})
    await projects.operator.put("/projects/other", json={})
    entries = (await manager.get("/audit?limit=3")).json()["entries"]
    assert [(entry["action"], entry["target"], entry["detail"]) for entry in entries] == [
        ("project.limit", "acme", {"max_bytes": 9}),
        ("key.change", key["id"], {"scopes": ["train"], "max_jobs": 1}),
        ("key.create", key["id"], {"name": "ci", "scopes": ["generate", "train"]}),
    ]
    assert len({entry["who"] for entry in entries}) == 1
    assert {entry["project"] for entry in (await manager.get("/audit")).json()["entries"]} == {"acme"}
