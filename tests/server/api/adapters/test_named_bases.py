"""A download names its base so that PEFT finds it: by its hub id if it has one."""

import io
import json
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.model.base.source import HubModel
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.conftest import BASE_NAME, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

HUB = HubModel(f"owner/{BASE_NAME.title()}", "c0ffee")


@pytest.fixture
async def hub_client(make_services: MakeServices) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a server whose base is on the hub."""
    async with client_of(new_app(replace(make_services(), hub_base=HUB))) as client:
        yield client


async def downloaded(client: httpx.AsyncClient, base_model: str | None) -> tuple[dict[str, Any], str, bytes]:
    """Upload an adapter whose configuration gives this base. Return the download's configuration, card and zip."""
    config, weights = peft_files(base_model=base_model)
    response = await client.post("/adapters/up", files=as_parts(config, weights))
    assert response.status_code == 201, response.text
    number = response.json()["version"]
    content = (await client.get(f"/adapters/up/{number}/download")).content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        found = json.loads(archive.read("adapter_config.json"))
        original = json.loads(config)
        differing = {key for key in found if found[key] != original.get(key)}
        assert differing <= {"base_model_name_or_path", "revision"}
        return found, archive.read("README.md").decode(), content


@pytest.mark.parametrize("name", [BASE_NAME, f"/home/me/models/{BASE_NAME}/", BASE_NAME.upper()])
async def test_names_of_the_served_base_become_its_hub_id(hub_client: httpx.AsyncClient, name: str) -> None:
    config, card, content = await downloaded(hub_client, name)
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB.id, HUB.revision)
    assert f'base_model: "{HUB.id}"' in card
    assert "AutoPeftModelForCausalLM.from_pretrained" in card
    again = await hub_client.post("/adapters/again", files={"archive": ("a.zip", content)})
    assert (again.status_code, again.json()["warnings"]) == (201, [])


@pytest.mark.parametrize("name", ["someone/other", f"someone/{BASE_NAME}"])
async def test_hub_ids_are_kept(hub_client: httpx.AsyncClient, name: str) -> None:
    config, card, _ = await downloaded(hub_client, name)
    assert config["base_model_name_or_path"] == name
    assert config.get("revision") is None
    assert f'base_model: "{name}"' in card


@pytest.mark.parametrize("name", [None, "other-base", "/home/me/other-base"])
async def test_unknown_bases_are_not_guessed(hub_client: httpx.AsyncClient, name: str | None) -> None:
    config, card, _ = await downloaded(hub_client, name)
    assert config["base_model_name_or_path"] == name
    assert "No hub id of its base" in card
    assert "PeftModel.from_pretrained(base," in card


async def test_a_base_that_is_not_on_the_hub_keeps_its_name(client: httpx.AsyncClient) -> None:
    config, card, _ = await downloaded(client, BASE_NAME)
    assert config["base_model_name_or_path"] == BASE_NAME
    assert f"No hub id of its base, {BASE_NAME}, is known." in card
