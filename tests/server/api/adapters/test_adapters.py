"""/adapters as specified by API.md: upload, list, download, delete."""

import io
import json
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load, save

from adapters.catalog.catalog import Catalog
from adapters.errors import NotFound
from adapters.peft import files as peft_format
from server.api.uploads import MAX_CONFIG_BYTES
from tests.server.api.adapters.peft_files import as_parts, as_zip, peft_files
from tests.server.api.fakes import FakeEngine
from tests.server.conftest import BASE_DIGEST, BASE_NAME, SHAPE

pytestmark = pytest.mark.anyio


async def test_upload_list_download(client: httpx.AsyncClient, engine: FakeEngine, tmp_path: Path) -> None:
    config, weights = peft_files(seed=1, rank=4)
    response = await client.post("/adapters/tweets", files=as_parts(config, weights))
    assert response.status_code == 201
    assert response.headers["location"] == "/adapters/tweets/1"
    version = response.json()
    created = datetime.fromisoformat(version["created_at"])
    assert timedelta() <= datetime.now(UTC) - created < timedelta(minutes=1)
    tensors = load(weights)
    assert version == {
        "name": "tweets",
        "version": 1,
        "kind": "adapter",
        "digest": version["digest"],
        "rank": 4,
        "alpha": 8.0,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": version["bytes"],
        "base_model": "someone/tiny-llama",
        "base_digest": BASE_DIGEST,
        "data_digest": None,
        "config": {
            "lora": {
                "rank": 4,
                "alpha": 8,
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "use_rslora": False,
                "rank_pattern": {},
                "alpha_pattern": {},
                "layers_to_transform": None,
            }
        },
        "metrics": {},
        "verdict": None,
        "parent": None,
        "job_id": None,
        "created_at": version["created_at"],
        "resident": False,
        "warnings": [],
    }
    assert len(version["digest"]) == 64
    assert version["bytes"] > len(weights) - 1000

    engine.resident = frozenset({version["digest"]})
    resident = {**version, "resident": True}
    adapter = {
        "name": "tweets",
        "kind": "adapter",
        "latest": 1,
        "visibility": "private",
        "aliases": {},
        "versions": [resident],
        "resident": True,
    }
    assert (await client.get("/adapters")).json() == {"adapters": [adapter], "next": None}
    assert (await client.get("/adapters/tweets")).json() == adapter
    assert (await client.get("/adapters/tweets/1")).json() == resident

    download = await client.get("/adapters/tweets/1/download")
    assert download.headers["content-type"] == "application/zip"
    assert download.headers["content-disposition"] == 'attachment; filename="tweets-1.zip"'
    assert int(download.headers["content-length"]) == len(download.content)
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        assert sorted(archive.namelist()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert archive.read("adapter_config.json") == config
        stored = load(archive.read("adapter_model.safetensors"))
    assert stored.keys() == tensors.keys()
    assert all(stored[name].equal(tensors[name]) for name in tensors)
    again = await client.post("/adapters/copy", files={"archive": ("x.zip", download.content)})
    assert again.json()["digest"] == version["digest"]
    assert not list(tmp_path.glob("**/.tmp-*"))


async def test_a_zip_is_the_same_as_its_two_files(client: httpx.AsyncClient) -> None:
    files = peft_files()
    plain = (await client.post("/adapters/a", files=as_parts(*files))).json()
    zipped = (await client.post("/adapters/a", files={"archive": ("a.zip", as_zip(*files))})).json()
    assert (plain["version"], zipped["version"]) == (1, 2)
    assert plain["digest"] == zipped["digest"]


async def test_versions_count_up_and_are_never_used_again(client: httpx.AsyncClient) -> None:
    for seed in range(3):
        await client.post("/adapters/a", files=as_parts(*peft_files(seed)))
    assert (await client.delete("/adapters/a/3")).status_code == 204
    assert (await client.get("/adapters/a")).json()["latest"] == 2
    assert (await client.get("/adapters/a/3")).status_code == 404
    assert (await client.post("/adapters/a", files=as_parts(*peft_files(3)))).json()["version"] == 4
    assert (await client.delete("/adapters/a")).status_code == 204
    assert (await client.get("/adapters")).json() == {"adapters": [], "next": None}
    assert (await client.post("/adapters/a", files=as_parts(*peft_files(0)))).json()["version"] == 5


async def test_an_upload_of_the_same_weights_says_so(client: httpx.AsyncClient) -> None:
    for seed in (0, 1):
        assert (await client.post("/adapters/a", files=as_parts(*peft_files(seed)))).json()["warnings"] == []
    again = (await client.post("/adapters/a", files=as_parts(*peft_files(0)))).json()
    assert again["version"] == 3
    assert again["warnings"] == ["its weights are those of a@1: stored as a new version all the same"]
    assert (await client.get("/adapters/a/3")).json() == again | {"warnings": []}
    assert (await client.post("/adapters/b", files=as_parts(*peft_files(0)))).json()["warnings"] == []


async def test_an_upload_that_is_deleted_at_once_has_worked(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Catalog, name: str) -> None:
        raise NotFound(name)

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "get", gone)
        uploaded = await client.post("/adapters/a", files=as_parts(*peft_files()))
    assert uploaded.status_code == 201
    assert (await client.get("/adapters/a/1/download")).status_code == 200


async def test_bytes_shared_by_two_names_outlive_one(client: httpx.AsyncClient) -> None:
    for name in ("a", "b"):
        await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))
    await client.delete("/adapters/a")
    assert (await client.get("/adapters/b/1/download")).status_code == 200


async def test_pages(client: httpx.AsyncClient) -> None:
    for name in ("c", "a", "b"):
        await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))

    async def page(query: str) -> tuple[list[str], str | None]:
        answer = (await client.get(f"/adapters?{query}")).json()
        return [adapter["name"] for adapter in answer["adapters"]], answer["next"]

    assert await page("") == (["a", "b", "c"], None)
    assert await page("limit=2") == (["a", "b"], "b")
    assert await page("limit=2&after=b") == (["c"], None)
    assert await page("limit=3") == (["a", "b", "c"], None)
    assert await page("after=a") == (["b", "c"], None)
    assert await page("name=b") == (["b"], None)
    assert await page("name=nobody") == ([], None)
    await client.post("/compositions/cab", json={"expression": "a*0.5"})
    assert await page("contains=B&limit=1") == (["b"], "b")
    assert await page("contains=B&limit=1&after=b") == (["cab"], None)
    assert await page("contains=_") == ([], None)


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x"])
async def test_bad_pages(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/adapters?{query}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["limit"]


@pytest.mark.parametrize(
    ("base_model", "warning"),
    [
        ("tiny-llama", None),
        ("/models/Tiny-Llama/", None),
        ("someone/other", "someone/other"),
        (None, "doesn't say"),
    ],
)
async def test_an_adapter_of_another_base_is_taken_with_a_warning(
    client: httpx.AsyncClient, base_model: str | None, warning: str | None
) -> None:
    response = await client.post("/adapters/a", files=as_parts(*peft_files(base_model=base_model)))
    assert response.status_code == 201
    listed = (await client.get("/adapters/a/1")).json()["warnings"]
    assert response.json()["warnings"] == listed
    assert (warning is None) == (listed == [])
    assert warning is None or warning in listed[0]


@pytest.mark.parametrize("name", ["base", BASE_NAME, "-a", ".a", "a b", "a" * 65, "ä", "a@1", "a*2"])
async def test_names_that_may_not_be(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["name"]


async def test_every_key_that_cannot_be_honoured_is_named(client: httpx.AsyncClient) -> None:
    config, weights = peft_files()
    changed = {**json.loads(config), "use_dora": True, "bias": "all", "mystery": 1, "init_lora_weights": "pissa"}
    tensors = load(weights)
    tensors["base_model.model.lm_head.lora_A.weight"] = next(iter(tensors.values())).clone()
    response = await client.post("/adapters/a", files=as_parts(json.dumps(changed).encode(), save(tensors)))
    assert response.status_code == 422
    named = {error["loc"][-1] for error in response.json()["errors"]}
    assert {"use_dora", "bias", "mystery", "init_lora_weights"} <= named
    assert "base_model.model.lm_head.lora_A.weight" in named
    assert (await client.get("/adapters")).json()["adapters"] == []


CONFIG, WEIGHTS = peft_files()


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ({"adapter_config": ("c", CONFIG)}, "adapter_model"),
        ({"adapter_model": ("w", WEIGHTS)}, "adapter_config"),
        ({"archive": ("a", as_zip(CONFIG, WEIGHTS)), "adapter_config": ("c", CONFIG)}, "archive"),
        ({"archive": ("a", b"PK")}, "archive"),
        ({"archive": ("a", b"")}, "archive"),
        ({"adapter_config": ("c", b"{"), "adapter_model": ("w", WEIGHTS)}, "adapter_config"),
        ({"adapter_config": ("c", CONFIG), "adapter_model": ("w", b"")}, "adapter_model"),
        ({"adapter_config": ("c", CONFIG), "adapter_model": ("w", WEIGHTS[:-1])}, "adapter_model"),
        ({"adapter_config": ("c", b" " * (MAX_CONFIG_BYTES + 1)), "adapter_model": ("w", b"")}, "adapter_config"),
        ({**as_parts(CONFIG, WEIGHTS), "extra": ("e", b"")}, "extra"),
        ({"adapter_config": (None, CONFIG), "adapter_model": ("w", WEIGHTS)}, "adapter_config"),
        ({"other": ("o", b"")}, "other"),
    ],
)
async def test_uploads_that_are_none(
    client: httpx.AsyncClient, tmp_path: Path, files: dict[str, tuple[str | None, bytes]], field: str
) -> None:
    response = await client.post("/adapters/a", files=files)
    assert response.status_code == 422, response.text
    assert field in [error["loc"][-1] for error in response.json()["errors"]] or field in [
        error["loc"][0] for error in response.json()["errors"]
    ]
    assert not list(tmp_path.glob("adapters/??"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"junk", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data"),
        (b"{}", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ],
)
async def test_bodies_that_are_no_upload(client: httpx.AsyncClient, content: bytes, kind: str) -> None:
    response = await client.post("/adapters/a", content=content, headers={"Content-Type": kind})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/adapters/no", "/adapters/no/1", "/adapters/a/2", "/adapters/a/" + "9" * 25])
async def test_what_is_not_there(client: httpx.AsyncClient, path: str) -> None:
    await client.post("/adapters/a", files=as_parts(*peft_files()))
    for method in ("GET", "DELETE"):
        response = await client.request(method, path)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
    if path.count("/") == 3:
        assert (await client.get(f"{path}/download")).status_code == 404
    assert (await client.get("/adapters/a/1")).status_code == 200


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.5", "latest"])
async def test_versions_that_are_no_number(client: httpx.AsyncClient, version: str) -> None:
    response = await client.get(f"/adapters/a/{version}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["version"]


async def test_a_rank_stabilized_adapter_with_patterns(client: httpx.AsyncClient) -> None:
    config, weights = peft_files(rank=2)
    changed = json.dumps({**json.loads(config), "use_rslora": True, "alpha_pattern": {"q_proj": 3}}).encode()
    response = await client.post("/adapters/a", files=as_parts(changed, weights))
    assert response.status_code == 201
    download = await client.get("/adapters/a/1/download")
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        stored = peft_format.read(
            archive.read("adapter_config.json"), archive.read("adapter_model.safetensors"), SHAPE
        )
    assert stored.weights.digest == response.json()["digest"]
