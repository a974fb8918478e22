"""Idempotency-Key: honoured by requests that queue jobs, refused by others whose repetition adds something."""

import json
from collections.abc import Mapping

import httpx
import pytest

from server.api.app import ROUTES
from server.api.openapi import App
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS

pytestmark = pytest.mark.anyio

KEY = {"Idempotency-Key": "once"}
ROWS_FILE = {"file": ("rows.jsonl", b'{"text": "a"}\n')}
ADDS = {"POST /adapters/{name}", "POST /adapters/{name}/import", "POST /keys", "POST /v1/files"}
HONOURS = {"POST /train", "POST /evaluate", "POST /compositions/{name}", "POST /v1/fine_tuning/jobs"}
REPEATABLE = {
    *("POST /generate", "POST /compare", "POST /decide", "POST /tokenize", "POST /detokenize"),
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/decisions"),
    "POST /datasets",  # the same rows have the same id
    *(f"POST /train/{{job_id}}/{move}" for move in ("cancel", "stop", "pause", "resume")),
    "POST /evaluate/{job_id}/cancel",
    *(f"POST /v1/fine_tuning/jobs/{{job_id}}/{move}" for move in ("cancel", "pause", "resume")),
}


def test_every_post_is_one_of_three_kinds(app: App) -> None:
    posts = {f"POST {path}": found["post"] for path, found in app.openapi()["paths"].items() if "post" in found}
    assert {post for post in posts if ROUTES.find(_filled(post)).methods["POST"].adds} == ADDS
    headers = {
        post: {parameter["name"] for parameter in operation.get("parameters", ())}
        for post, operation in posts.items()
    }
    assert {post for post, names in headers.items() if "Idempotency-Key" in names} == HONOURS
    assert posts.keys() - ADDS - HONOURS == REPEATABLE


def _filled(post: str) -> str:
    return post.removeprefix("POST ").replace("{", "").replace("}", "")


@pytest.mark.parametrize(
    ("path", "request_of"),
    [
        ("/adapters/a", {"files": as_parts(*peft_files())}),
        ("/adapters/a/import", {"json": {"repository": "a/b"}}),
        ("/keys", {"json": {"name": "a", "scopes": ["admin"]}}),
        ("/v1/files", {"files": ROWS_FILE, "data": {"purpose": "fine-tune"}}),
    ],
)
async def test_requests_that_add_something_refuse_it(
    client: httpx.AsyncClient, path: str, request_of: Mapping[str, object]
) -> None:
    refused = await client.post(path, headers=KEY, **request_of)  # type: ignore[arg-type]
    is_openais = path.startswith("/v1")
    assert refused.status_code == (400 if is_openais else 422)
    message = refused.json()["error"]["message"] if is_openais else refused.json()["detail"]
    assert message.startswith("Idempotency-Key: is not supported here")
    for listed in ("/adapters", "/keys", "/v1/files"):
        found = (await client.get(listed)).json()
        assert next(value for value in found.values() if isinstance(value, list)) == []


@pytest.mark.parametrize("post", sorted(HONOURS))
async def test_requests_that_queue_a_job_honour_it(client: httpx.AsyncClient, post: str) -> None:
    content = "\n".join(map(json.dumps, ROWS)).encode()
    dataset = (await client.post("/datasets", files={"file": ("rows.jsonl", content)})).json()["id"]
    file = await client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
    await client.post("/adapters/a", files=as_parts(*peft_files()))
    path, body = {
        "POST /train": ("/train", {"name": "a", "data": ROWS}),
        "POST /evaluate": ("/evaluate", {"adapters": ["base"], "datasets": [dataset]}),
        "POST /compositions/{name}": ("/compositions/m", {"expression": "a*2", "method": "ties"}),
        "POST /v1/fine_tuning/jobs": (
            "/v1/fine_tuning/jobs",
            {"model": "base", "training_file": file.json()["id"]},
        ),
    }[post]
    first, second, other = [
        await client.post(path, json=body, headers={"Idempotency-Key": key}) for key in ("once", "once", "twice")
    ]
    assert (first.status_code, second.status_code) == (other.status_code, other.status_code), second.text
    assert first.json()["id"] == second.json()["id"] != other.json()["id"]


async def test_compositions_without_a_method_refuse_it(client: httpx.AsyncClient) -> None:
    await client.post("/adapters/a", files=as_parts(*peft_files()))
    refused = await client.post("/compositions/c", json={"expression": "a*2"}, headers=KEY)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["loc"] == ["Idempotency-Key"]
    assert "only for merges" in refused.json()["detail"]
    assert (await client.get("/adapters/c")).status_code == 404


async def test_generations_accept_it(client: httpx.AsyncClient) -> None:
    """Clients may send it with every request, and a second answer adds nothing."""
    assert (await client.post("/generate", json={"prompt": "a"}, headers=KEY)).status_code == 200
