"""The engine on a GPU: the same answers as transformers gives on the CPU, with adapters, blends and preemption."""

import random
from pathlib import Path

import pytest
import torch

from server.model.smollm import SmolLM
from server.model.weights import BaseModel, load_base
from tests.engine_kit import build_engine, check_idle, run
from tests.server.engine.test_engine import assert_follows_the_merged_model
from tests.server.engine.traffic import TIGHT, library, requests_of_all_kinds

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_requests_of_all_kinds(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    base = load_base(tiny_base.directory, torch.float32, "cuda")
    adapters, requests = library(base), requests_of_all_kinds(base, 32)
    model = SmolLM(base.config, base.weights, max_positions=512)
    engine = build_engine(base, adapters, model=model, num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests, arrivals=random.Random(0))
    check_idle(engine)
    assert engine.stats.preemptions > 0
    greedy = [r for r in requests if r.sampling.temperature == 0 and r.sampling.repetition_penalty == 1]
    found = [results[request.request_id, 0] for request in greedy]
    assert_follows_the_merged_model(tiny_base_dir, adapters, greedy, found)


def test_bf16_ends_and_frees_everything(tiny_base: BaseModel) -> None:
    base = load_base(tiny_base.directory, torch.bfloat16, "cuda")
    engine = build_engine(base, library(base), num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests_of_all_kinds(base, 32), arrivals=random.Random(0))
    check_idle(engine)
    assert all(result.finish_reason == "length" for result in results.values())
