"""Adapters from the hub: disabled by default, two files of one commit, and checked like uploads, byte for byte."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from safetensors.torch import load

from server.api.app import create_app
from server.api.imports import get_fetch
from server.model.base.hub import fetch_adapter
from tests.kits.adapter_hub import REPO, hub_of
from tests.kits.fake_hub import COMMIT
from tests.server.api.adapters.peft_files import peft_files
from tests.server.conftest import MakeServices, client_of

pytestmark = pytest.mark.anyio

CONFIG, WEIGHTS = peft_files(rank=3)
FILES = {
    "adapter_config.json": CONFIG,
    "adapter_model.safetensors": WEIGHTS,
    "adapter_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "run.py": b"code",
    "other/adapter_model.safetensors": b"",
}


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return create_app(make_services(allow_hub_adapters=True))


@contextmanager
def hub(
    app: FastAPI, files: dict[str, bytes], asked: list[str] | None = None, revision: str = "v1"
) -> Iterator[None]:
    with hub_of(files, [] if asked is None else asked, revision) as endpoint:
        app.dependency_overrides[get_fetch] = lambda: partial(fetch_adapter, endpoint=endpoint)
        yield


async def ask(client: httpx.AsyncClient, name: str = "tweets", **body: object) -> httpx.Response:
    return await client.post(f"/adapters/{name}/import", json={"repo_id": REPO, **body})


async def test_it_is_off_by_default(make_services: MakeServices) -> None:
    app = create_app(make_services())
    asked: list[str] = []
    with hub(app, FILES, asked):
        async with client_of(app) as client:
            response = await ask(client)
    assert response.status_code == 403
    assert "SMOLORA_ALLOW_HUB_ADAPTERS" in response.json()["detail"]
    assert asked == []


async def test_two_files_of_one_commit_and_nothing_else(
    app: FastAPI, client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    asked: list[str] = []
    with hub(app, FILES, asked):
        response = await ask(client, revision="v1")
    assert response.status_code == 201, response.text
    version = response.json()
    assert (version["name"], version["version"], version["rank"]) == ("tweets", 1, 3)
    assert version["config"]["source"] == {"hub": REPO, "revision": COMMIT}
    assert response.headers["location"] == "/adapters/tweets/1"
    assert (await client.get("/adapters/tweets/1")).json() == version
    resolved = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
    assert resolved == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("secret" in path for path in asked)

    download = await client.get("/adapters/tweets/1/download")
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        assert archive.read("adapter_config.json") == CONFIG
        stored, sent = load(archive.read("adapter_model.safetensors")), load(WEIGHTS)
    assert stored.keys() == sent.keys()
    assert all(stored[name].numpy().tobytes() == sent[name].numpy().tobytes() for name in sent)


async def test_the_newest_commit_and_a_given_one(app: FastAPI, client: httpx.AsyncClient) -> None:
    bodies: list[dict[str, Any]] = [{}, {"revision": None}, {"revision": COMMIT}]
    with hub(app, FILES):
        for number, body in enumerate(bodies, 1):
            version = (await ask(client, **body)).json()
            assert (version["version"], version["config"]["source"]["revision"]) == (number, COMMIT)


@pytest.mark.parametrize(
    ("files", "body", "status", "field"),
    [
        (FILES, {"repo_id": "owner/none"}, 404, None),
        (FILES, {"revision": "v2"}, 404, None),
        ({"adapter_config.json": CONFIG, "adapter_model.bin": b"pickle"}, {}, 404, None),
        ({**FILES, "adapter_config.json": b"{}" * (1 << 20)}, {}, 422, "repo_id"),
        ({**FILES, "adapter_model.safetensors": b"junk"}, {}, 422, "adapter_model"),
        (FILES, {"repo_id": "tweets"}, 422, "repo_id"),
        (FILES, {"repo_id": "../x/y"}, 422, "repo_id"),
        (FILES, {"revision": ""}, 422, "revision"),
        (FILES, {"unknown": 1}, 422, "unknown"),
    ],
)
async def test_refused_imports(
    app: FastAPI,
    client: httpx.AsyncClient,
    files: dict[str, bytes],
    body: dict[str, Any],
    status: int,
    field: str | None,
    tmp_path: Path,
) -> None:
    with hub(app, files):
        response = await ask(client, **body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["loc"][-1] for error in response.json()["errors"]] == ([field] if field else [])
    assert (await client.get("/adapters")).json()["adapters"] == []
    assert list((tmp_path / "adapters").glob("??")) == []


async def test_names_are_checked_before_anything_is_fetched(app: FastAPI, client: httpx.AsyncClient) -> None:
    asked: list[str] = []
    with hub(app, FILES, asked):
        assert (await ask(client, "base")).status_code == 422
    assert asked == []


async def test_a_hub_that_can_not_be_reached(app: FastAPI, client: httpx.AsyncClient) -> None:
    app.dependency_overrides[get_fetch] = lambda: partial(fetch_adapter, endpoint="http://127.0.0.1:9")  # discard
    response = await ask(client)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_a_hub_that_sends_too_slowly(make_services: MakeServices) -> None:
    app = create_app(make_services(allow_hub_adapters=True, request_timeout=0.5))
    with hub_of({**FILES, "adapter_model.safetensors": bytes(300)}, [], pause=0.01) as endpoint:
        app.dependency_overrides[get_fetch] = lambda: partial(fetch_adapter, endpoint=endpoint)
        async with client_of(app) as client:
            response = await ask(client)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "30"
    message = "the hub took longer than SMOLORA_REQUEST_TIMEOUT (0.5 s) to send adapter_model.safetensors"
    assert response.json()["detail"] == message
