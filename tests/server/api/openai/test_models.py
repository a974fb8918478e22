"""/v1/models: the base, adapters and compositions."""

import httpx
import pytest

from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.conftest import BASE_NAME

pytestmark = pytest.mark.anyio


async def test_models_are_listed(client: httpx.AsyncClient) -> None:
    base = {"id": BASE_NAME, "object": "model", "created": 0, "owned_by": "smolora"}
    assert (await client.get("/v1/models")).json() == {"object": "list", "data": [base]}
    for name, seed in (("tweets", 1), ("movies", 2), ("tweets", 3)):
        posted = await client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed)))
        assert posted.status_code == 201
    composed = await client.post("/compositions/both", json={"expression": "tweets*0.5+movies"})
    assert composed.status_code == 201, composed.text
    answer = (await client.get("/v1/models")).json()
    assert answer["data"][0] == base
    assert [(entry["id"], entry["parent"]) for entry in answer["data"][1:]] == [
        (name, BASE_NAME) for name in ("both", "movies", "tweets")
    ]
    assert all(entry["created"] > 1_700_000_000 for entry in answer["data"][1:])


async def test_model_by_expression(client: httpx.AsyncClient) -> None:
    await client.post("/adapters/tweets", files=as_parts(*peft_files(1)))
    for expression in ("tweets", "tweets@1", "tweets@1*0.5+tweets*-1"):
        answer = (await client.get("/v1/models/" + expression.replace("+", "%2B"))).json()
        assert (answer["id"], answer["object"], answer["parent"]) == (expression, "model", BASE_NAME)
    for name in (BASE_NAME, "base"):
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == BASE_NAME


@pytest.mark.parametrize(("name", "status"), [("nobody", 404), ("tweets@2", 404), ("a*1e5", 400)])
async def test_unknown_models_are_refused(client: httpx.AsyncClient, name: str, status: int) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert (response.status_code, response.json()["error"]["param"]) == (status, "model")


async def test_models_are_deleted(client: httpx.AsyncClient) -> None:
    for seed in (1, 2, 3):
        await client.post("/adapters/tweets", files=as_parts(*peft_files(seed)))
    await client.put("/adapters/tweets/aliases/prod", json={"version": 2})
    for expression in ("base", BASE_NAME, "tweets@prod", "tweets*0.5", "tweets%2Btweets"):
        response = await client.delete(f"/v1/models/{expression}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    held = await client.delete("/v1/models/tweets@2")
    assert (held.status_code, held.headers["x-should-retry"]) == (409, "false")
    assert "prod" in held.json()["error"]["message"]
    deleted = await client.delete("/v1/models/tweets@3")
    assert deleted.json() == {"id": "tweets@3", "object": "model", "deleted": True}
    assert (await client.get("/adapters/tweets")).json()["latest"] == 2
    await client.delete("/adapters/tweets/aliases/prod")
    assert (await client.delete("/v1/models/tweets")).status_code == 200
    assert (await client.delete("/v1/models/tweets")).status_code == 404
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [BASE_NAME]
