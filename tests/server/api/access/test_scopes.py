"""Authorization matrix: every route of the OpenAPI document with every kind of key; new routes can't be
forgotten."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, FastAPI

from server.access.principal import OPERATORS_SCOPES, SCOPES, Scope
from server.access.tables import api_keys
from server.api.app import ROUTES
from server.api.openapi import App
from server.api.routes import ADMIN, ANY, GENERATE, MANAGE, METRICS, NOWHERE, READ, TRAIN, Routes, requires
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

EVERYTHING: dict[str, frozenset[Scope] | None] = {
    "GET /health": None,
    "GET /ready": None,
    "GET /metrics": METRICS,
    "POST /generate": GENERATE,
    "POST /compare": GENERATE,
    "POST /decide": GENERATE,
    "POST /v1/chat/completions": GENERATE,
    "POST /v1/completions": GENERATE,
    "POST /v1/decisions": GENERATE,
    "POST /tokenize": READ,
    "POST /detokenize": READ,
    "GET /tokenizer_info": READ,
    "GET /adapters": READ,
    "GET /adapters/{name}": READ,
    "GET /adapters/{name}/{version}": READ,
    "GET /v1/models": READ,
    "GET /v1/models/{model}": READ,
    "GET /usage": READ | MANAGE,
    "GET /keys": MANAGE,
    "POST /keys": MANAGE,
    "GET /keys/self": ANY,
    "GET /keys/{key_id}": MANAGE,
    "PATCH /keys/{key_id}": MANAGE,
    "DELETE /keys/{key_id}": MANAGE,
    "GET /projects": MANAGE,
    "GET /projects/{project}": MANAGE,
    "PATCH /projects/{project}": MANAGE,
    "PUT /projects/{project}": ADMIN,
    "DELETE /projects/{project}": ADMIN,
    "GET /audit": MANAGE,
    "GET /version": ANY,
}
"""Scopes of each route that `train` doesn't open, or not alone; `train` opens all others."""
VALUES = {
    "name": "nobody",
    "version": "1",
    "alias": "prod",
    "model": "nobody",
    "job_id": "job-0",
    "dataset_id": "ds-0",
    "file_id": "file-0",
    "key_id": "key-0",
    "project": "nobody",
}


def operations(app: App) -> list[tuple[str, str]]:
    """Return (method, template) of every route of the document."""
    paths = app.openapi()["paths"]
    return [(method.upper(), template) for template, methods in paths.items() for method in methods]


def wanted(method: str, template: str) -> frozenset[Scope] | None:
    return EVERYTHING.get(f"{method} {template}", TRAIN)


def test_every_route_is_in_the_table(app: App) -> None:
    found = operations(app)
    assert len(found) > 50
    for method, template in found:
        path = template.format(**VALUES)
        assert ROUTES.find(path).is_open == (wanted(method, template) is None), template
        assert ROUTES.find(path).methods[method].scopes == wanted(method, template), (method, template)


def test_every_route_is_its_own_template(app: App) -> None:
    """The template is the document's, except for the form of parameters that contain slashes."""
    for _, template in operations(app):
        path = template.format(**VALUES)
        expected = template.replace("/v1/models/{model}", "/v1/models/{model...}")
        assert ROUTES.find(path).template == expected, template
    assert ROUTES.find("/v1/models/acme/tweets@3").template == "/v1/models/{model...}"
    assert ROUTES.find("/docs/a/b.js").template == "/docs/{file...}"
    for path in ("/nowhere", "/generate/", "/adapters/a/b/c/d", "//keys", "/train/x/y", ""):
        assert ROUTES.find(path) is NOWHERE


def test_unknown_paths_need_the_operators_scope() -> None:
    for path in ("/nowhere", "/generate/", "/adapters/a/b/c/d", "/train/x/y", "/KEYS", "//keys", "/v1", "/docs2"):
        assert ROUTES.find(path) is NOWHERE
    assert not NOWHERE.is_open


def test_a_route_that_declares_nothing_is_in_no_table() -> None:
    router = APIRouter()

    @router.get("/a")
    @requires(TRAIN)
    async def declared() -> None: ...

    assert Routes([router]).find("/a").methods["GET"].scopes == TRAIN

    @router.get("/b")
    async def undeclared() -> None: ...

    with pytest.raises(KeyError, match="undeclared"):
        Routes([router])


@pytest.fixture
def locked(make_services: MakeServices) -> FastAPI:
    return new_app(make_services())


@pytest.fixture
async def operator(locked: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client with the first key, the operator's."""
    async with client_of(locked) as client:
        made = await client.post("/keys", json={"name": "operator", "scopes": ["admin"]})
        client.headers["Authorization"] = f"Bearer {made.json()['secret']}"
        yield client


async def statuses(app: FastAPI, headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """Return every route's status for requests with these headers and an empty body."""
    assert isinstance(app, App)
    async with client_of(app) as client:
        return {
            (method, template): (
                await client.request(method, template.format(**VALUES), headers=headers)
            ).status_code
            for method, template in operations(app)
        }


async def test_no_route_opens_without_a_key(
    locked: FastAPI, operator: httpx.AsyncClient, database: sa.Engine
) -> None:
    expired = (await operator.post("/keys", json={"name": "expired", "scopes": list(SCOPES)})).json()
    with database.begin() as connection:
        past = sa.update(api_keys).where(api_keys.c.id == expired["id"])
        connection.execute(past.values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    await operator.put("/projects/any", json={})  # keys are read again
    revoked = (await operator.post("/keys", json={"name": "revoked", "scopes": list(SCOPES)})).json()
    await operator.delete(f"/keys/{revoked['id']}")
    secrets = [None, "sk-smolora-" + "A" * 43, "", expired["secret"], revoked["secret"], operator_like(operator)]
    for secret in secrets:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        found = await statuses(locked, headers)
        shut = {key for key, status in found.items() if status == 401}
        assert shut == {(method, path) for method, path in found if wanted(method, path) is not None}, secret


def operator_like(operator: httpx.AsyncClient) -> str:
    """Return a secret with one character changed."""
    secret = operator.headers["Authorization"].removeprefix("Bearer ")
    return secret[:-1] + ("A" if secret[-1] != "A" else "B")


@pytest.mark.parametrize("scope", SCOPES)
async def test_scopes_open_only_their_routes(locked: FastAPI, operator: httpx.AsyncClient, scope: Scope) -> None:
    project = "default" if scope in OPERATORS_SCOPES else "acme"
    key = (await operator.post("/keys", json={"name": "one", "project": project, "scopes": [scope]})).json()
    found = await statuses(locked, {"Authorization": f"Bearer {key['secret']}"})
    for (method, template), status in found.items():
        needed = wanted(method, template)
        may = scope == "admin" or needed is None or scope in needed
        assert status != 401, (method, template)
        assert (status == 403) == (not may), (method, template, status)


async def test_a_fixed_path_opens_no_route_of_a_pattern(locked: FastAPI, operator: httpx.AsyncClient) -> None:
    """PATCH /keys/self is PATCH /keys/{key_id}: it needs that route's scope, though GET /keys/self needs none."""
    for method in ("PATCH", "DELETE"):
        assert ROUTES.find("/keys/self").methods[method].scopes == MANAGE
        key = (await operator.post("/keys", json={"name": "one", "scopes": ["generate"]})).json()
        async with client_of(locked) as client:
            client.headers["Authorization"] = f"Bearer {key['secret']}"
            refused = await client.request(method, "/keys/self", json={})
        assert refused.json()["detail"] == "this key lacks the scope manage: it has generate"
        assert (await operator.request(method, "/keys/self", json={})).status_code == 404


async def test_a_refusal_names_the_scope(locked: FastAPI, operator: httpx.AsyncClient) -> None:
    key = (await operator.post("/keys", json={"name": "one", "scopes": ["generate"]})).json()
    async with client_of(locked) as client:
        client.headers["Authorization"] = f"Bearer {key['secret']}"
        response = await client.post("/train", json={})
        assert response.json()["detail"] == "this key lacks the scope train: it has generate"
        theirs = await client.post("/v1/files", json={})
        assert theirs.json()["error"]["message"] == "this key lacks the scope train: it has generate"
        assert theirs.json()["error"]["type"] == "permission_error"
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.put("/generate", json={})).status_code == 405


async def test_unknown_path_suggests_a_similar_one(locked: FastAPI, operator: httpx.AsyncClient) -> None:
    """The answer is the same for any key: these paths are public in /docs."""
    made = await operator.post("/keys", json={"name": "k", "scopes": ["generate"]})
    async with client_of(locked) as client:
        for secret in (made.json()["secret"], operator.headers["Authorization"].removeprefix("Bearer ")):
            headers = {"Authorization": f"Bearer {secret}"}
            response = await client.post("/chat/completions", headers=headers, json={})
            assert response.status_code == 404
            assert "the client's base URL must end with /v1" in response.json()["error"]["message"]


async def test_trailing_line_end_does_not_match_a_route(
    locked: FastAPI, operator: httpx.AsyncClient, app: App
) -> None:
    """Routers ignore a trailing line end, which must not lead to a path with other scopes."""
    made = await operator.post("/keys", json={"name": "k", "scopes": ["generate"]})
    async with client_of(locked) as client:
        for secret in (made.json()["secret"], operator.headers["Authorization"].removeprefix("Bearer ")):
            for method, template in operations(app):
                if not ROUTES.find(template).is_open:
                    for end in ("%0A", "%0D%0A", "%00"):
                        path, headers = template.format(**VALUES) + end, {"Authorization": f"Bearer {secret}"}
                        response = await client.request(method, path, headers=headers)
                        assert response.status_code == 404, (method, path)
                        assert "no such path" in response.text, (method, path)
