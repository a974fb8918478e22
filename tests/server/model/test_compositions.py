"""Blends of adapters compared with the dense W + Σ wᵢ sᵢ Bᵢ Aᵢ merged into transformers' own model."""

import random
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.model.base.weights import BaseModel, load_base
from server.model.rank_rows import RankRows, RowFormat
from server.model.smollm import SmolLM
from tests.kits.engines import place, random_adapter
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.kits.paged import paged_logits

BLENDS: list[tuple[tuple[int, float], ...]] = [
    ((0, 1.0),),
    ((0, 0.5), (1, 0.5)),
    ((1, 1.0), (2, -1.0)),
    ((2, 0.7), (3, -0.4), (5, 1.3)),
    ((0, 0.3), (1, -0.2), (4, 0.9), (5, -1.0)),
    ((0, 0.2), (1, 0.3), (2, -0.5), (3, 0.4), (4, 0.6)),
    ((3, -2.0),),
    (),
]


def library(base: BaseModel) -> list[LoraWeights]:
    """Return adapters of mixed ranks, targets and layers."""
    shape, last = base.config.shape, base.config.num_layers - 1
    return [
        random_adapter(shape, 0, rank=16),
        random_adapter(shape, 1, rank=1),
        random_adapter(shape, 2, rank=8, modules=["q_proj", "v_proj"]),
        random_adapter(shape, 3, rank=lambda key: 1 + (3 * key.layer + len(key.module)) % 9),
        random_adapter(shape, 4, rank=64, modules=["down_proj", "k_proj"], layers=[0, last]),
        random_adapter(shape, 5, rank=4, modules=["o_proj", "gate_proj", "up_proj"], layers=[last // 2]),
    ]


def test_a_batch_of_blends(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """All run at once, in random chunks; each has the logits of its own merged model."""
    adapters, reference = library(tiny_base), load_reference(tiny_base_dir)
    rows = RankRows(
        tiny_base.config.shape,
        max_rank=128,
        row_format=RowFormat.of_torch(torch.float32, tiny_base.device),
        device=tiny_base.device,
    )
    placements = place(rows, adapters)
    rng = random.Random(0)
    token_ids = [[rng.randrange(512) for _ in range(rng.randint(20, 90))] for _ in BLENDS]
    parts = [tuple((placements[i], weight) for i, weight in blend) for blend in BLENDS]
    model = SmolLM(tiny_base.config, tiny_base.weights, max_positions=128)
    found = paged_logits(model, token_ids, seed=2, rows=rows, parts=parts, num_prompt_tokens=70)
    plain = [logits(reference, ids) for ids in token_ids]
    for blend, ids, ours, without in zip(BLENDS, token_ids, found, plain, strict=True):
        with merged(reference, [(adapters[i], weight) for i, weight in blend]) as model_with:
            exact = logits(model_with, ids)
        assert not blend or (exact - without).abs().max() > 0.1, "the blend must show"
        assert (ours - exact).abs().max() <= 1e-4 * (1 + float(exact.abs().max()))


def test_bf16_stays_near(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    base = load_base(tiny_base.directory, torch.bfloat16)
    adapters, reference = library(tiny_base), load_reference(tiny_base_dir)
    rows = RankRows(
        base.config.shape,
        max_rank=128,
        row_format=RowFormat.of_torch(torch.bfloat16, base.device),
        device=base.device,
    )
    placements = place(rows, adapters)
    token_ids = [[(11 * i + 3 * n) % 512 for i in range(24)] for n in range(len(BLENDS))]
    parts = [tuple((placements[i], weight) for i, weight in blend) for blend in BLENDS]
    model = SmolLM(base.config, base.weights, max_positions=64, pack=True)
    for blend, ids, ours in zip(
        BLENDS, token_ids, paged_logits(model, token_ids, rows=rows, parts=parts), strict=True
    ):
        with merged(reference, [(adapters[i], weight) for i, weight in blend]) as model_with:
            exact = logits(model_with, ids)
        assert (ours - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.thorough  # end_to_end/test_blends.py has blends on this base
@pytest.mark.real
def test_the_real_base(real_base: BaseModel, hf_base_dir: Path) -> None:
    shape = real_base.config.shape
    adapters = [
        random_adapter(shape, 0, rank=16, strength=0.05),
        random_adapter(shape, 1, rank=4, modules=["q_proj", "v_proj", "down_proj"], strength=0.05),
        random_adapter(shape, 2, rank=8, layers=range(10, 20), strength=0.05),
    ]
    blends: list[tuple[tuple[int, float], ...]] = [((0, 0.7), (1, 0.3)), ((0, 1.0), (1, -0.5), (2, 1.5)), ()]
    rows = RankRows(
        shape, max_rank=40, row_format=RowFormat.of_torch(torch.float32, real_base.device), device=real_base.device
    )
    placements = place(rows, adapters)
    ids = list(real_base.tokenizer.encode("In the beginning the universe was created. This has made a lot of"))
    parts = [tuple((placements[i], weight) for i, weight in blend) for blend in blends]
    model = SmolLM(real_base.config, real_base.weights, max_positions=64)
    found = paged_logits(model, [ids] * 3, rows=rows, parts=parts, num_prompt_tokens=10)
    reference = load_reference(hf_base_dir)
    plain = logits(reference, ids)
    for blend, ours in zip(blends, found, strict=True):
        with merged(reference, [(adapters[i], weight) for i, weight in blend]) as model_with:
            exact = logits(model_with, ids)
        assert not blend or (exact - plain).abs().max() > 0.5, "the blend must show"
        assert (ours - exact).abs().max() <= 1e-3
