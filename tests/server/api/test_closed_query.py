"""Queries are closed: unknown and repeated parameters are refused on every documented route."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from server.api.openapi import App
from server.jobs.jobs import Jobs
from tests.server.api.train_kit import train_body

pytestmark = pytest.mark.anyio


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path


@pytest.mark.parametrize(("query", "hint"), [("dryrun=true", ": did you mean dry_run?"), ("force=1", "")])
async def test_a_misspelt_dry_run_queues_no_job(
    client: httpx.AsyncClient, jobs: Jobs, query: str, hint: str
) -> None:
    answer = await client.post(f"/train?{query}", json=train_body())
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"loc": [query.partition("=")[0]], "message": f"no such parameter{hint}"},
    ]
    assert jobs.list() == []


async def test_every_documented_route_refuses_an_unknown_parameter(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    """In its own format: 422 with `errors`, under /v1 400 with `param`."""
    assert isinstance(app, App)
    num_routes = 0
    for method, template in operations(app):
        path = template.replace("{version}", "1").replace("{", "").replace("}", "")
        answer = await client.request(method, f"{path}?no_such_thing=1")
        if path.startswith("/v1/"):
            assert answer.status_code == 400, (method, path)
            assert answer.json()["error"]["param"] == "no_such_thing", (method, path)
        else:
            assert answer.status_code == 422, (method, path)
            assert answer.json()["errors"][0]["loc"] == ["no_such_thing"], (method, path)
        num_routes += 1
    assert num_routes > 50


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usage?by=project&by=key", "by"),
        ("/usage?by=key&by=key", "by"),
        ("/adapters?name=a&name=b", "name"),
        ("/v1/files?limit=1&limit=2", "limit"),
        ("/v1/fine_tuning/jobs?metadata[a]=1&metadata[a]=2", "metadata[a]"),
    ],
)
async def test_a_parameter_given_twice_is_refused(client: httpx.AsyncClient, path: str, name: str) -> None:
    answer = await client.get(path)
    found = answer.json()["error"] if path.startswith("/v1/") else answer.json()["errors"][0]
    assert answer.status_code == (400 if path.startswith("/v1/") else 422)
    assert "must be given once" in found["message"]
    assert name in (found.get("param"), *found.get("loc", ()))


async def test_only_metadata_takes_keys(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/fine_tuning/jobs?metadata[a]=1&metadata[b]=2")).status_code == 200
    assert (await client.get("/v1/fine_tuning/jobs?limit[a]=1")).status_code == 400


async def test_any_number_of_unknown_parameters_is_one_short_answer(client: httpx.AsyncClient) -> None:
    answer = await client.get("/adapters?" + "&".join(f"p{number}=1" for number in range(1000)))
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 33
    assert answer.json()["detail"].endswith("and 997 more")


@pytest.mark.parametrize("path", ["/?utm_source=mail", "/docs?x=1", "/redoc?x=1"])
async def test_a_page_takes_any_query(client: httpx.AsyncClient, path: str) -> None:
    """Links to pages get parameters from elsewhere, and users can't do anything about it."""
    assert (await client.get(path)).status_code == 200
