"""Aliases as specified by API.md: they move at once, protect what they name, and moving latest back is the
rollback."""

import httpx
import pytest

from tests.server.api.adapters.peft_files import as_parts, peft_files

pytestmark = pytest.mark.anyio


async def upload(client: httpx.AsyncClient, name: str, *seeds: int) -> list[str]:
    """Publish an adapter for each seed; return the digests."""
    digests = []
    for seed in seeds:
        response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed)))
        assert response.status_code == 201, response.text
        digests.append(response.json()["digest"])
    return digests


async def point(client: httpx.AsyncClient, name: str, alias: str, version: object) -> httpx.Response:
    return await client.put(f"/adapters/{name}/aliases/{alias}", json={"version": version})


async def used(client: httpx.AsyncClient, adapter: str) -> list[dict[str, object]]:
    """Return the leaf parts that an answer with the expression used."""
    response = await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "adapter": adapter})
    assert response.status_code == 200, response.text
    found: list[dict[str, object]] = response.json()["adapters"]
    return found


async def test_an_alias_is_set_moved_used_and_removed(client: httpx.AsyncClient) -> None:
    digests = await upload(client, "a", 0, 1)
    response = await point(client, "a", "prod", 1)
    assert response.status_code == 200
    assert response.json() == (await client.get("/adapters/a")).json()
    assert response.json()["aliases"] == {"prod": 1}
    assert [(part["version"], part["digest"]) for part in await used(client, "a@prod")] == [(1, digests[0])]
    assert (await point(client, "a", "prod", 2)).json()["aliases"] == {"prod": 2}
    assert [(part["version"], part["digest"]) for part in await used(client, "a@prod")] == [(2, digests[1])]
    assert (await client.delete("/adapters/a/aliases/prod")).status_code == 204
    assert (await client.get("/adapters/a")).json()["aliases"] == {}
    assert (await client.post("/generate", json={"prompt": "a", "adapter": "a@prod"})).status_code == 404
    again = await client.delete("/adapters/a/aliases/prod")
    assert again.status_code == 404
    assert "prod" in again.json()["detail"]


async def test_latest_is_an_alias_and_moving_it_back_is_the_rollback(client: httpx.AsyncClient) -> None:
    digests = await upload(client, "a", 0, 1)
    assert (await point(client, "a", "latest", 1)).json()["latest"] == 1
    assert [part["digest"] for part in await used(client, "a")] == [digests[0]]
    assert [part["digest"] for part in await used(client, "a@latest")] == [digests[0]]
    assert (await client.get("/adapters/a")).json()["aliases"] == {}
    await upload(client, "a", 2)
    assert (await client.get("/adapters/a")).json()["latest"] == 3
    await point(client, "a", "latest", 1)
    assert (await client.delete("/adapters/a/1")).status_code == 204  # latest protects nothing
    assert (await client.get("/adapters/a")).json()["latest"] == 3
    refused = await client.delete("/adapters/a/aliases/latest")
    assert refused.status_code == 409


async def test_aliased_versions_need_force_to_delete(client: httpx.AsyncClient) -> None:
    await upload(client, "a", 0, 1)
    await point(client, "a", "prod", 1)
    await point(client, "a", "canary", 1)
    for path in ("/adapters/a/1", "/adapters/a"):
        refused = await client.delete(path)
        assert refused.status_code == 409
        assert refused.headers["content-type"] == "application/problem+json"
        assert "a@prod" in refused.json()["detail"]
        assert "a@canary" in refused.json()["detail"]
    assert len((await client.get("/adapters/a")).json()["versions"]) == 2
    assert (await client.delete("/adapters/a/1?force=true")).status_code == 204
    listed = (await client.get("/adapters/a")).json()
    assert listed["aliases"] == {}
    assert [version["version"] for version in listed["versions"]] == [2]
    await point(client, "a", "prod", 2)
    assert (await client.delete("/adapters/a?force=true")).status_code == 204
    assert (await client.get("/adapters/a")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("a/aliases/prod", {"version": 2}, 404, None),
        ("a/aliases/prod", {"version": 10**30}, 404, None),
        ("a/aliases/latest", {"version": 2}, 404, None),
        ("b/aliases/prod", {"version": 1}, 404, None),
        ("a/aliases/prod", {"version": 0}, 422, "version"),
        ("a/aliases/prod", {"version": "1"}, 422, "version"),
        ("a/aliases/prod", {"version": True}, 422, "version"),
        ("a/aliases/prod", {}, 422, "version"),
        ("a/aliases/prod", {"version": 1, "more": 1}, 422, "more"),
        ("a/aliases/prod", [], 422, "body"),
        ("a/aliases/2", {"version": 1}, 422, "alias"),
        ("a/aliases/-x", {"version": 1}, 422, "alias"),
        ("a/aliases/" + "x" * 65, {"version": 1}, 422, "alias"),
        ("a/aliases/x%20y", {"version": 1}, 422, "alias"),
    ],
)
async def test_aliases_that_do_not_go(
    client: httpx.AsyncClient, path: str, body: object, status: int, field: str | None
) -> None:
    await upload(client, "a", 0)
    response = await client.put(f"/adapters/{path}", json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["loc"][-1] for error in response.json()["errors"]] == ([field] if field else [])
    assert (await client.get("/adapters/a")).json()["aliases"] == {}
