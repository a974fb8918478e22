"""Lists in pages: the same parameters, the same header and the same ends."""

import re
from collections.abc import Mapping

import httpx
import pytest

from server.access.usage import Usage
from server.api.app import ROUTES
from server.api.openapi import App
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS

pytestmark = pytest.mark.anyio

NUM_ITEMS = 5


async def fill(client: httpx.AsyncClient) -> None:
    """Make five of everything that is listed."""
    for number in range(NUM_ITEMS):
        name = f"n{number}"
        files = {"file": ("rows.jsonl", f'{{"text": "{name}"}}\n'.encode())}
        uploads = [
            client.post(f"/adapters/{name}", files=as_parts(*peft_files())),
            client.post("/datasets", files=files),
            client.post("/train", json={"name": name, "data": ROWS}),
            client.put(f"/projects/{name}", json={}),
            client.post("/keys", json={"name": name, "scopes": ["admin"]}),
        ]
        for upload in uploads:
            response = await upload
            assert response.status_code in (200, 201, 202), response.text
            if "secret" in response.text:
                client.headers["Authorization"] = f"Bearer {response.json()['secret']}"


LISTS: Mapping[str, tuple[str, str]] = {
    "/adapters": ("adapters", "name"),
    "/datasets": ("datasets", "id"),
    "/train": ("jobs", "id"),
    "/keys": ("keys", "id"),
    "/projects": ("projects", "name"),
    "/audit": ("entries", "number"),
}
"""Each list's field, and its items' ids."""


async def test_every_list_has_pages(client: httpx.AsyncClient) -> None:
    await fill(client)
    for path, (field, of_item) in LISTS.items():
        whole = (await client.get(path)).json()
        assert whole["next"] is None
        assert len(whole[field]) >= NUM_ITEMS
        url: str | None = f"{path}?limit=2"
        found = []
        while url is not None:
            response = await client.get(url)
            assert response.status_code == 200, response.text
            page = response.json()
            found += [item[of_item] for item in page[field]]
            linked = re.fullmatch(r'<(/[^>]+)>; rel="next"', response.headers.get("link", ""))
            assert (linked is None) == (page["next"] is None), path
            assert page["next"] in (None, page[field][-1][of_item])
            url = None if linked is None else linked[1]
        assert found == [item[of_item] for item in whole[field]], path


async def test_links_keep_the_other_parameters(client: httpx.AsyncClient) -> None:
    await fill(client)
    response = await client.get("/adapters?contains=N&limit=1&after=n1")
    assert response.headers["link"] == '</adapters?contains=N&limit=1&after=n2>; rel="next"'
    (job, *_) = (await client.get("/train?limit=1&status=queued")).json()["jobs"]
    assert (await client.get("/train?limit=1&status=queued")).headers["link"] == (
        f'</train?limit=1&status=queued&after={job["id"]}>; rel="next"'
    )


@pytest.mark.parametrize("path", [path for path in LISTS if path not in ("/adapters", "/audit")])
async def test_unknown_ids_begin_no_page(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"{path}?after=nothing")
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["loc"][-1] == "after"
    assert "begin with the first page" in error["message"]


async def test_usage_has_pages(client: httpx.AsyncClient, app: App) -> None:
    await fill(client)
    ledger = app.state.services.access.ledger
    for number in range(NUM_ITEMS):
        ledger.add("default", f"key-{number}", "+".join(f"n{one}" for one in range(number + 1)), Usage(requests=1))
    assert (await client.get("/usage")).json()["next"] is None
    for by in ("key", "adapter"):
        whole = (await client.get(f"/usage?by={by}")).json()["rows"]
        assert len(whole) == NUM_ITEMS
        found, url = [], f"/usage?by={by}&limit=2"
        while url:
            response = await client.get(url)
            assert response.status_code == 200, response.text
            found += response.json()["rows"]
            assert response.json()["next"] in (None, found[-1][by])
            url = response.headers.get("link", "").partition(">")[0].removeprefix("<")
        assert found == whole
    assert (await client.get("/usage?by=key&after=nothing")).status_code == 422


def test_every_list_is_in_pages(app: App) -> None:
    for path, operations in app.openapi()["paths"].items():
        schema = operations.get("get", {}).get("responses", {}).get("200", {})
        reference = str(schema.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", ""))
        if not reference.endswith(("List", "UsageAnswer")) or path.startswith("/v1/"):
            continue
        parameters = {parameter["name"] for parameter in operations["get"]["parameters"]}
        assert {"limit", "after"} <= parameters, path
        assert "Link" in schema["headers"], path
        assert ROUTES.find(path).methods["GET"].is_list, path
