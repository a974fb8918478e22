"""The engine on a GPU: answers equal transformers' on the CPU, few waits, concurrent loads, and memory."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device
from server.model.smollm import SmolLM
from server.serve.engine import step_bytes
from tests.kits.engines import GREEDY, build_engine, check_idle, random_adapter, refs, run
from tests.kits.gpu import NEEDS_GPU, waits
from tests.kits.grammars import guidance_of
from tests.server.engine.step_kit import EVERYTHING, LETTERS, PENALIZED, PLAIN, SAMPLED, decoding, rows
from tests.server.engine.test_engine import assert_follows_the_merged_model
from tests.server.engine.traffic import TIGHT, library, prompt, requests_of_all_kinds

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def tiny(tiny_base: BaseModel) -> BaseModel:
    """Return the tiny base in fp32, on the GPU."""
    choose_device("cuda", "fp32")
    return load_base(tiny_base.directory, torch.float32, "cuda")


@pytest.fixture(scope="module")
def real(base_dir: Path) -> BaseModel:
    """Return the real base as it is served, on the GPU."""
    device, dtype = choose_device("cuda", "auto")
    return load_base(base_dir, dtype, device)


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (2,))
    guidance.check(LETTERS)
    yield guidance
    guidance.close()


def test_requests_of_all_kinds(tiny: BaseModel, tiny_base_dir: Path) -> None:
    adapters, requests = library(tiny), requests_of_all_kinds(tiny, 32)
    model = SmolLM(tiny.config, tiny.weights, max_positions=512)
    engine = build_engine(tiny, adapters, model=model, num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests, arrivals=random.Random(0))
    check_idle(engine)
    engine.close()
    assert engine.stats.preemptions > 0
    greedy = [r for r in requests if r.sampling.temperature == 0 and r.sampling.repetition_penalty == 1]
    found = [results[request.request_id, 0] for request in greedy]
    assert_follows_the_merged_model(tiny_base_dir, adapters, greedy, found)


def test_bf16_ends_and_frees_everything(tiny_base: BaseModel) -> None:
    base = load_base(tiny_base.directory, torch.bfloat16, "cuda")
    engine = build_engine(base, library(base), num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    results = run(engine, requests_of_all_kinds(base, 32), arrivals=random.Random(0))
    check_idle(engine)
    engine.close()
    assert all(result.finish_reason == "length" for result in results.values())


@pytest.mark.parametrize(
    ("requests", "num_waits"),
    [
        pytest.param(rows(), 3, id="plain"),
        pytest.param(rows(num_parts=1), 3, id="mixed"),
        pytest.param(rows(SAMPLED), 3, id="sampled"),
        pytest.param(rows(PENALIZED), 3, id="penalties"),
        pytest.param(rows(replace(PLAIN, logprobs=5)), 3, id="logprobs"),
        pytest.param(rows(EVERYTHING, num_parts=1, grammar=LETTERS), 5, id="everything"),
    ],
)
def test_a_step_waits_as_rarely_as_on_the_fake_gpu(
    tiny: BaseModel, guidance: Guidance, requests: list[GenerationRequest], num_waits: int
) -> None:
    """Counted by torch itself, which also sees waits within operations."""
    engine = build_engine(tiny, library(tiny), guidance=guidance)
    decoding(engine, requests)
    found = waits(engine.step)
    engine.close()
    assert 1 <= len(found) <= num_waits, found


def cold_start(engine: Engine, cold: GenerationRequest) -> int:
    """Return the number of steps between the request's arrival and its admission."""
    before = engine.num_steps
    engine.add(cold)
    while engine.stats.num_waiting:
        engine.step()
    return engine.num_steps - before


@pytest.mark.real
def test_an_adapter_is_loaded_during_steps(real: BaseModel) -> None:
    """Others continue meanwhile. The adapter gets the rows of an idle one, and answers as when warm."""
    shape = real.config.shape
    adapters = {name: random_adapter(shape, seed, rank=64) for seed, name in enumerate(("cold", "other"))}
    warm = build_engine(real, adapters, max_rank=128)
    cold = GenerationRequest("cold", prompt(40), replace(GREEDY, max_tokens=24), refs(cold=1.0))
    expected = run(warm, [cold])["cold", 0]
    warm.close()
    engine = build_engine(real, adapters, max_rank=64)
    run(engine, [replace(cold, request_id="other", adapters=refs(other=1.0))])
    decoding(engine, rows(replace(PLAIN, max_tokens=400)))
    assert cold_start(engine, cold) >= 2
    assert engine.stats.adapter_evictions == 1
    found: list[int] = []
    while len(found) < len(expected.token_ids):
        outputs = [output for output in engine.step() if output.request_id == "cold"]
        found += [entry.chosen.token_id for output in outputs for entry in output.logprobs]
    engine.close()
    assert found[:8] == expected.token_ids[:8], "later ones may leave it at a near tie: its company is another"


@pytest.mark.real
def test_a_step_takes_no_more_memory_than_reserved(real: BaseModel) -> None:
    limits = SchedulerLimits.on("cuda", 8)
    engine = build_engine(real, num_blocks=1100, max_model_len=2048, limits=limits)
    requests = [
        GenerationRequest(f"r{i}", prompt(1900 - 7 * i, seed=i), replace(SAMPLED, max_tokens=40, logprobs=5))
        for i in range(8)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(engine, requests)
    engine.close()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= step_bytes(real.config, real.dtype.itemsize, limits, 2048)
