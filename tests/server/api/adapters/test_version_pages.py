"""Pages of versions: lists stay short however many versions there are, and lose none."""

from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.expression import parse
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import submit

pytestmark = pytest.mark.anyio

NUM_VERSIONS = 250


@pytest.fixture
async def catalog(client: httpx.AsyncClient, database: sa.Engine) -> Catalog:
    """Return a catalog with an adapter `a`, and a composition `mix` of many versions."""
    assert (await client.post("/adapters/a", files=as_parts(*peft_files()))).status_code == 201
    catalog = Catalog(database)
    for number in range(1, NUM_VERSIONS + 1):
        catalog.compose("mix", parse(f"a*0.{number:03}1"))
    return catalog


async def get(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await client.get(path)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def numbers(adapter: dict[str, Any]) -> list[int]:
    return [version["version"] for version in adapter["versions"]]


async def test_pages_have_every_version_once(client: httpx.AsyncClient, catalog: Catalog) -> None:
    newest = await get(client, "/adapters/mix")
    assert numbers(newest) == list(range(151, 251))
    assert newest["next"] == 151
    for limit in (1, 7, 100, 250, 1000):
        found: list[int] = []
        page = await get(client, f"/adapters/mix?limit={limit}")
        while True:
            assert len(numbers(page)) <= limit
            assert (page["latest"], page["kind"], len(page["parts"])) == (250, "composition", 1)
            found = numbers(page) + found
            if "next" not in page:
                break
            page = await get(client, f"/adapters/mix?limit={limit}&after={page['next']}")
        assert found == list(range(1, 251)), limit
    assert numbers(await get(client, "/adapters/mix?after=1")) == []
    for query in ("limit=0", "limit=10001", "after=0", "after=x"):
        assert (await client.get(f"/adapters/mix?{query}")).status_code == 422
    assert (await client.get("/adapters/mix/3")).status_code == 200


async def test_latest_and_aliases_are_complete_on_each_page(client: httpx.AsyncClient, catalog: Catalog) -> None:
    await client.put("/adapters/mix/aliases/old", json={"version": 3})
    await client.put("/adapters/mix/aliases/older", json={"version": 3})
    moved = await client.put("/adapters/mix/aliases/latest", json={"version": 2})
    for page in (moved.json(), await get(client, "/adapters/mix"), await get(client, "/adapters/mix?after=151")):
        assert (page["latest"], page["aliases"]) == (2, {"old": 3, "older": 3})
        assert page["parts"][0]["weight"] == 0.0021  # of the latest version, which isn't on the page
        assert len(page["versions"]) == 100
        assert page["next"] == page["versions"][0]["version"]
    (listed,) = (await get(client, "/adapters?name=mix"))["adapters"]
    assert listed == await get(client, "/adapters/mix")


async def test_a_list_has_fewer_versions_of_each_of_many_adapters(
    client: httpx.AsyncClient, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        catalog.compose(f"other{number}", parse("a*2"))
    monkeypatch.setattr("server.api.adapters.MAX_ALL", 50)
    page = await get(client, "/adapters?limit=20")
    by_name = {adapter["name"]: adapter for adapter in page["adapters"]}
    assert len(by_name) == 11
    assert numbers(by_name["mix"]) == list(range(247, 251))  # 50 versions for 11 adapters
    assert (by_name["mix"]["next"], "next" in by_name["a"]) == (247, False)
    (alone,) = (await get(client, "/adapters?name=mix"))["adapters"]
    assert len(numbers(alone)) == 50


async def test_deleting_an_adapter_checks_all_versions(client: httpx.AsyncClient, database: sa.Engine) -> None:
    """A job needs the oldest one, which is on no answer's first page."""
    assert (await client.post("/adapters/a", files=as_parts(*peft_files()))).status_code == 201
    for number in range(NUM_VERSIONS):
        Catalog(database).publish(
            "a", digest=f"{number:064x}", rank=2, alpha=4.0, target_modules=["q_proj"], parameters=1, bytes=1
        )
    job = await submit(client, start_from="a@1")
    held = await client.delete("/adapters/a")
    assert (held.status_code, held.json()["detail"].startswith("a job needs a@1:")) == (409, True)
    await client.post(f"/train/{job}/cancel")
    assert (await client.delete("/adapters/a")).status_code == 204
