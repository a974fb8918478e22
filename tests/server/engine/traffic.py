"""Adapters and requests of all kinds, and comparisons of results."""

import random
from dataclasses import replace

import pytest

from adapters.lora import MODULES, LoraWeights
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel
from tests.kits.engines import (
    GREEDY,
    Result,
    random_adapter,
    refs,
)

SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
TIGHT = SchedulerLimits(max_num_seqs=32, chunk_size=8, max_prefill_tokens=32)


def library(base: BaseModel, num: int = 16, strength: float = 0.3) -> dict[str, LoraWeights]:
    """Return adapters of mixed ranks, modules and layers, named 00, 01, …"""
    modules = [MODULES, ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ("k_proj", "o_proj")]
    found = {}
    for i in range(num):
        rank = (1, 4, 8, 16, 3)[i % 5]
        shape = base.config.shape
        found[f"{i:02}"] = random_adapter(shape, i, rank=rank, modules=modules[i % 4], strength=strength)
    return found


def requests_of_all_kinds(base: BaseModel, num: int, seed: int = 0) -> list[GenerationRequest]:
    """Return requests, each with a different adapter or blend, prompts of all lengths, half greedy, some with
    several choices."""
    rng = random.Random(seed)
    found = []
    for i in range(num):
        if i % 2 == 0:
            adapters = refs(**{f"{i // 2:02}": 1.0 if i % 4 else -0.7})
        else:
            names = rng.sample(range(16), rng.randint(2, 5))
            adapters = refs(**{f"{name:02}": rng.uniform(-1, 1) for name in names})
        sampling = replace(GREEDY if i % 4 < 2 else SAMPLED, max_tokens=rng.randint(4, 24), seed=i)
        if i % 8 == 2:
            sampling = replace(sampling, repetition_penalty=1.3, top_k=50)
        prompt = tuple(rng.randrange(base.config.vocab_size) for _ in range(rng.randint(1, 70)))
        found.append(
            GenerationRequest(f"r{i}", prompt, sampling, () if i == num - 1 else adapters, 2 if i % 7 == 3 else 1)
        )
    return found


def assert_same(found: Result, expected: Result) -> None:
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(20, 500) for _ in range(length))
