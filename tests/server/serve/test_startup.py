"""The whole server on a tiny base: from settings to an answer under an uploaded adapter."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from server.api.app import create_app
from server.api.deps import Services
from server.config import Settings, WorkerSettings
from server.database.file import driver
from server.engine.scheduler import SchedulerLimits
from server.errors import StartupError
from server.jobs.run_job import _load
from server.model.base.weights import BaseModel
from server.model.load import serves_natively
from server.model.native import library
from server.model.text.chat import ChatMessage
from server.serve.startup import build
from server.training.spec import JobSpec
from tests.kits.cache import CACHE
from tests.kits.native import native_library, tiny_of
from tests.kits.tiny import save_tiny_base
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.cluster.replicas import Local
from tests.server.conftest import client_of

pytestmark = pytest.mark.anyio


def settings(home: Path, model: Path, **others: object) -> Settings:
    return Settings.model_validate(
        {
            "home": home,
            "model": str(model),
            "device": "cpu",
            "dtype": "fp32",
            "adapter_cache_bytes": "4MiB",
            **others,
        }
    )


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
async def services(tmp_path: Path, tiny_base_dir: Path, said: list[str]) -> AsyncIterator[Services]:
    services = build(settings(tmp_path / "home", tiny_base_dir), said.append)
    services.engine.start()
    yield services
    await services.engine.stop()


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(services)) as client:
        yield client


async def test_settings_lead_to_answers(
    client: httpx.AsyncClient, services: Services, said: list[str], tiny_base_dir: Path, tiny_base: BaseModel
) -> None:
    assert said[0] == "Converting tiny-llama"
    assert said[1].startswith(f"the database is SQLite {driver.sqlite_version} with a ")
    assert said[2:] == [f"loading {tiny_base_dir} on cpu in float32"]
    assert (services.base_name, services.max_num_tokens) == ("tiny-llama", 512)
    body = {"prompt": "404 Not", "max_tokens": 8, "temperature": 0}
    base = (await client.post("/generate", json=body)).json()
    assert base["model"] == "tiny-llama"

    files = as_parts(*peft_files(shape=tiny_base.config.shape))
    assert (await client.post("/adapters/a", files=files)).status_code == 201
    tuned = (await client.post("/generate", json={**body, "adapter": "a*3"})).json()
    assert tuned["choices"] != base["choices"]
    assert (await client.post("/generate", json=body)).json()["choices"] == base["choices"]
    assert (await client.get("/adapters/a/1")).json()["resident"] is True


async def test_an_adapter_larger_than_the_pool_is_refused_at_use(
    client: httpx.AsyncClient, services: Services, tiny_base: BaseModel
) -> None:
    """A rank beyond the base's sizes is no reason to refuse an upload. Requests that need it are refused, and
    others are still served."""
    rank = 2 * services.engine.stats.max_adapter_rank + 1
    assert rank > max(max(sizes) for sizes in tiny_base.config.shape.features.values())
    files = as_parts(*peft_files(rank=rank, shape=tiny_base.config.shape))
    assert (await client.post("/adapters/huge", files=files)).status_code == 201
    body = {"prompt": "404 Not", "max_tokens": 8}
    refused = await client.post("/generate", json={**body, "adapter": "huge"})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["loc"] == ["adapter"], refused.json()
    assert (await client.post("/generate", json=body)).status_code == 200


async def test_a_second_start_finds_everything(services: Services, said: list[str]) -> None:
    took, end = 9.0, time.monotonic() + 30
    while took >= 3 and time.monotonic() < end:  # others use the machine, for seconds at a time
        started = time.perf_counter()
        again = build(services.settings, said.append)
        took = time.perf_counter() - started
        await again.engine.stop()
    assert took < 3
    assert sum(line.startswith("Converting") for line in said) == 1


async def test_a_machine_without_a_compiler(
    tmp_path: Path, tiny_base_dir: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bf16 in the processor torch computes in fp32, several times more slowly, and logs why."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("server.model.device.cpu_flags", lambda: frozenset({"avx2"}))
    auto = build(settings(tmp_path / "first", tiny_base_dir, dtype="auto"), said.append)
    assert "no native code: no C++ compiler (g++, clang++, c++); torch computes instead, more slowly" in said
    await auto.engine.stop()
    del said[:]
    for dtype, native in (("fp32", True), ("auto", False)):
        asked = settings(tmp_path / dtype, tiny_base_dir, dtype=dtype, native=native)
        await build(asked, said.append).engine.stop()
    assert "native" not in "".join(said), "nobody asked for it"


async def test_a_wheels_library_needs_no_compiler(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    native_library()
    monkeypatch.setattr(library, "PREBUILT", CACHE / "native")
    base = tiny_of(tmp_path, "grouped")
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = settings(tmp_path / "home", base.directory, dtype="bf16")
    services = build(asked, said.append)
    await services.engine.stop()
    assert [line for line in said if "native" in line] == []
    worker = WorkerSettings.model_validate({name: getattr(asked, name) for name in WorkerSettings.model_fields})
    _, loaded = _load(worker, JobSpec("trained"))
    assert loaded is not None
    assert serves_natively(worker.model_copy(update={"dtype": "auto"}))


async def test_the_commit_is_read_once_at_the_start(
    tmp_path: Path, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that moves on later isn't what runs."""
    commits = iter(["c0ffee"])
    monkeypatch.setattr("server.serve.startup.commit", lambda: next(commits))
    services = build(settings(tmp_path, tiny_base_dir), print)
    async with client_of(create_app(services)) as client:
        for _ in range(2):
            assert (await client.get("/version")).json()["commit"] == "c0ffee"
    await services.engine.stop()


async def test_a_shorter_model_length(tmp_path: Path, tiny_base_dir: Path) -> None:
    services = build(settings(tmp_path, tiny_base_dir, max_model_len=40), print)
    assert services.max_num_tokens == 40
    await services.engine.stop()


async def test_a_cache_for_less_than_one_sequence(tmp_path: Path) -> None:
    """The whole blocks of the cache limit a sequence's tokens, also by default."""
    model = save_tiny_base(tmp_path / "tiny", options={"max_position_embeddings": 4096})
    services = build(settings(tmp_path / "home", model, kv_cache_bytes="1MiB"), print)
    assert services.max_num_tokens == services.engine.stats.kv_blocks_total * 16 < 4096
    services.engine.start()
    long = ChatMessage("user", "4 " * 620)
    assert services.max_num_tokens - 1024 < len(services.encoder.messages([long])) < services.max_num_tokens
    call = {"model": "tiny", "messages": [{"role": "user", "content": long.content}], "ignore_eos": True}
    async with client_of(create_app(services)) as client:
        answer = await client.post("/v1/chat/completions", json=call)
    await services.engine.stop()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == services.max_num_tokens


async def test_replicas_with_room_for_less(tmp_path: Path, tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    """An API process uses the replicas' limits, not those of its settings or the base."""
    local = Local(tiny_base, limits=SchedulerLimits(max_num_seqs=1), max_queue=1, num_blocks=9)
    replica = local.benches["replica-0"].asynchronous
    services = build(settings(tmp_path, tiny_base_dir), print, connect=lambda base, store: local.client)
    assert services.max_num_tokens == services.max_model_len == 512, "nobody has said otherwise"
    chat = {"model": "tiny-llama", "messages": [{"role": "user", "content": "404 Not"}], "ignore_eos": True}
    async with local, client_of(create_app(services)) as client:
        assert services.max_num_tokens == replica.max_num_tokens < 512
        answer = await client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] == replica.max_num_tokens
        many = {"model": "tiny-llama", "prompt": ["a"] * (2 * replica.max_in_flight + 1), "max_tokens": 1}
        refused = await client.post("/v1/completions", json=many)
        assert refused.status_code == 400, refused.text
        assert "send fewer at a time" in refused.text


def test_caches_larger_than_any_memory(tmp_path: Path, tiny_base_dir: Path) -> None:
    with pytest.raises(StartupError, match="SMOLORA_KV_CACHE_BYTES"):
        build(settings(tmp_path, tiny_base_dir, kv_cache_bytes=1 << 55), print)


def test_a_length_beyond_the_models_is_refused(tmp_path: Path, tiny_base_dir: Path) -> None:
    with pytest.raises(StartupError, match="ends at 512 tokens"):
        build(settings(tmp_path, tiny_base_dir, max_model_len=513), print)
