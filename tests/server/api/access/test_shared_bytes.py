"""Two projects with equal tensors share bytes and nothing else: each has its own configuration."""

import io
import json
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters.library import Library
from adapters.names import Viewpoint
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, read
from server.training.spec import JobSpec, LoraSpec
from tests.server.api.access.key_kit import Projects, two_projects
from tests.server.api.adapters.peft_files import PATHS, as_parts, peft_files
from tests.server.api.train_kit import train_body
from tests.server.conftest import SHAPE

pytestmark = pytest.mark.anyio

SECRET = "/home/acme/secret-client/base"
CONFIG, WEIGHTS = peft_files(base_model=SECRET)


@pytest.fixture
async def projects(app: FastAPI) -> AsyncIterator[Projects]:
    async with two_projects(app) as projects:
        yield projects


def config(**changes: object) -> bytes:
    return json.dumps(json.loads(CONFIG) | changes).encode()


RESHAPED = config(
    r=200, lora_alpha=400, rank_pattern=dict.fromkeys(PATHS, 2), alpha_pattern=dict.fromkeys(PATHS, 4)
)
"""The same scalings described differently: the digest is equal."""
ROOTED = config(lora_alpha=2 * 2**0.5, use_rslora=True, base_model_name_or_path=None)


async def upload(client: httpx.AsyncClient, name: str, config: bytes) -> str:
    response = await client.post(f"/adapters/{name}", files=as_parts(config, WEIGHTS))
    assert response.status_code == 201, response.text
    digest: str = response.json()["digest"]
    return digest


async def download(client: httpx.AsyncClient, path: str) -> dict[str, bytes]:
    response = await client.get(f"/adapters/{path}/download")
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


async def loaded(client: httpx.AsyncClient, path: str, digest: str) -> dict[str, Any]:
    """Return the downloaded configuration; check that the tensors can be read with it, to the same effect."""
    files = await download(client, path)
    assert list(files) == [CONFIG_NAME, WEIGHTS_NAME, "README.md"]
    adapter = read(files[CONFIG_NAME], files[WEIGHTS_NAME], SHAPE)
    assert adapter.weights.digest == digest
    document: dict[str, Any] = json.loads(files[CONFIG_NAME])
    return document


@pytest.mark.parametrize(
    "guess",
    [
        config(base_model_name_or_path=None),
        config(base_model_name_or_path="tiny-llama"),
        config(inference_mode=True),
        RESHAPED,
        ROOTED,
    ],
)
async def test_a_download_has_nothing_of_anothers(projects: Projects, guess: bytes) -> None:
    """Whichever project was first: the first gets its own file, the second one that describes its own upload."""
    for name, (first, second) in {"a": (CONFIG, guess), "b": (guess, CONFIG)}.items():
        digest = await upload(projects.acme, name, first)
        await upload(projects.other, name, second)
        assert (await download(projects.acme, f"{name}/1"))[CONFIG_NAME] == first
        own, said = json.loads(second), await loaded(projects.other, f"{name}/1", digest)
        for key in ("base_model_name_or_path", "r", "lora_alpha"):
            assert said[key] == own[key], key
        for key, empty in {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}.items():
            assert said[key] == own.get(key, empty), key
        for client in (projects.acme, projects.other):
            assert (await client.delete(f"/adapters/{name}")).status_code == 204


async def test_fields_without_effect_are_not_shared(projects: Projects) -> None:
    """For example the module to import a class from; the rest of the two configurations is equal."""
    sent = config(auto_mapping={"parent_library": "evil", "base_model_class": "Model"}, revision="secret")
    digest = await upload(projects.other, "guess", sent)
    await upload(projects.acme, "mine", CONFIG)
    assert json.loads(sent).items() <= (await loaded(projects.other, "guess/1", digest)).items()
    said = await loaded(projects.acme, "mine/1", digest)
    assert not {"auto_mapping", "revision"} & said.keys()
    assert said["base_model_name_or_path"] == SECRET


async def test_training_continues_from_the_own_configuration(projects: Projects) -> None:
    await upload(projects.other, "guess", RESHAPED)
    await upload(projects.acme, "mine", CONFIG)
    await projects.acme.put("/adapters/mine/visibility", json={"visibility": "public"})
    for client, name, rank in (
        (projects.acme, "mine", 2),
        (projects.other, "guess", 200),
        (projects.other, "acme/mine", 2),
    ):
        response = await client.post("/train?dry_run=true", json=train_body(start_from=name))
        assert response.status_code == 200, response.text
        lora = response.json()["config"]["lora"]
        assert (lora["rank"], lora["alpha"], lora["use_rslora"]) == (rank, 2.0 * rank, False)
        assert lora["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    asked = train_body(start_from="mine", lora={"rank": 2, "alpha": 4.0})
    assert (await projects.acme.post("/train?dry_run=true", json=asked)).status_code == 200


@pytest.mark.parametrize("kept", [JobSpec("codes", lora=LoraSpec(rank=2, alpha=4.0)).to_document(), {}])
@pytest.mark.parametrize("guess", [RESHAPED, CONFIG, ROOTED])
async def test_configuration_of_trained_adapters_is_private(
    projects: Projects, library: Library, guess: bytes, kept: dict[str, object]
) -> None:
    """A job's specification doesn't mention layers or patterns, and old records don't mention anything."""
    digest = await upload(projects.other, "guess", guess)
    shape: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_modules": tuple(PATHS), "parameters": 1}
    catalog = library.of(Viewpoint("acme")).catalog
    catalog.publish("codes", digest=digest, bytes=1, base_model="tiny-llama", config=kept, **shape)
    said = await loaded(projects.acme, "codes/1", digest)
    assert (said["base_model_name_or_path"], said["r"], said["lora_alpha"]) == ("tiny-llama", 2, 4)
    assert not said["use_rslora"]
    job = await projects.acme.post("/train?dry_run=true", json=train_body(start_from="codes"))
    lora = job.json()["config"]["lora"]
    assert (lora["rank"], lora["alpha"], lora["use_rslora"]) == (2, 4.0, False)


async def test_an_old_record_has_the_file_that_says_the_same(projects: Projects, library: Library) -> None:
    """As it was uploaded, when versions only stored their rank, alpha and base."""
    digest = await upload(projects.other, "guess", CONFIG)
    shape: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_modules": tuple(PATHS), "parameters": 1}
    library.of(Viewpoint("acme")).catalog.publish("mine", digest=digest, bytes=1, base_model=SECRET, **shape)
    assert (await download(projects.acme, "mine/1"))[CONFIG_NAME] == CONFIG
