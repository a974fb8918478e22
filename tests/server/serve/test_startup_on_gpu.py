"""The start of a server on a fake GPU: its memory use, and errors if there is too little memory."""

from pathlib import Path

import pytest
import torch

from server.api.deps import Services
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.errors import StartupError
from server.serve.engine import gpu_share
from server.serve.startup import build
from tests.kits.fake_gpu.card import Card, is_on_card
from tests.kits.fake_gpu.cuda import fake_cuda

pytestmark = pytest.mark.anyio

GIB = 1 << 30


def settings(home: Path, model: Path, **others: object) -> Settings:
    return Settings.model_validate({"home": home, "model": str(model), "device": "cuda", **others})


def engine_of(services: Services) -> Engine:
    assert isinstance(services.engine, AsyncEngine)
    return services.engine._engine


async def test_the_server_limits_its_gpu_memory(tmp_path: Path, tiny_base_dir: Path) -> None:
    """Caches have the requested size, steps the size for a GPU, and everything is on the GPU, in bf16."""
    given = settings(tmp_path, tiny_base_dir, kv_cache_bytes="4MiB", adapter_cache_bytes="4MiB")
    with fake_cuda() as card:
        services = build(given, lambda line: None)
        assert card.memory_fraction == gpu_share(given, card.total_bytes) == pytest.approx(0.5 - 1 / 24)
        engine = engine_of(services)
        limits = engine.config.scheduler
        assert (limits.max_num_seqs, limits.chunk_size, limits.max_prefill_tokens) == (256, 512, 4096)
        pools = (*engine.pool.rows.a.values(), *engine.pool.rows.b.values())
        assert all(is_on_card(pool) and pool.dtype is torch.bfloat16 for pool in pools)
        await services.engine.stop()


async def test_caches_use_the_gpu_memory_that_training_leaves(tmp_path: Path, tiny_base_dir: Path) -> None:
    """Of 3 GiB, 2.8 are free: half is for training, 1 GiB for the processes, and some for a step."""
    with fake_cuda(Card(total_bytes=3 * GIB, free_bytes=int(2.8 * GIB))):
        services = build(settings(tmp_path, tiny_base_dir, max_num_seqs=1024), lambda line: None)
        config = engine_of(services).config
        await services.engine.stop()
    assert 0.1 * GIB < config.kv_cache_bytes + config.adapter_cache_bytes < 0.3 * GIB


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (Card(is_full=True), "no room for the base"),
        (Card(total_bytes=2 * GIB, free_bytes=GIB // 2), "SMOLORA_TRAIN_MEMORY, or train elsewhere"),
        (Card(name="Tesla P100", capabilities=((6, 0),)), "can't use Tesla P100"),
        (Card(capabilities=()), "finds 0 CUDA devices"),
    ],
    ids=["full", "little left", "too old", "missing"],
)
def test_missing_gpu_memory_is_an_error_of_one_line(
    card: Card, says: str, tmp_path: Path, tiny_base_dir: Path
) -> None:
    with fake_cuda(card), pytest.raises(StartupError, match=says) as caught:
        build(settings(tmp_path, tiny_base_dir), lambda line: None)
    assert "\n" not in str(caught.value)
