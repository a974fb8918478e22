"""The whole engine: concurrent requests answer as alone, and all resources are freed."""

import hashlib
import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel
from server.model.smollm import SmolLM
from tests.kits.engines import (
    GREEDY,
    Result,
    build_engine,
    check_idle,
    refs,
    run,
)
from tests.kits.oracles.hugging_face import assert_greedy, load_reference, logits, merged
from tests.server.engine.traffic import SAMPLED, TIGHT, assert_same, library, requests_of_all_kinds


def sha256(base: BaseModel) -> str:
    sha = hashlib.sha256()
    for name, tensor in base.weights.tensors():
        sha.update(name.encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def check_blocks(engine: Engine) -> None:
    engine.blocks.check(engine.scheduler.running)


def alone(
    base: BaseModel, model: SmolLM, adapters: dict[str, LoraWeights], request: GenerationRequest
) -> list[Result]:
    """Return the choices of one request that runs alone, with default limits."""
    engine = build_engine(base, adapters, model=model)
    results = run(engine, [request])
    check_idle(engine)
    engine.close()
    return [results[request.request_id, index] for index in range(request.n)]


def assert_follows_the_merged_model(
    directory: Path, adapters: dict[str, LoraWeights], requests: Seq[GenerationRequest], found: Seq[Result]
) -> None:
    """Greedy tokens are those of W + Σ w s B A, computed by transformers with teacher forcing."""
    reference = load_reference(directory)
    for request, result in zip(requests, found, strict=True):
        with merged(reference, [(adapters[ref.digest], ref.weight) for ref in request.adapters]) as model:
            theirs = logits(model, (*request.prompt_token_ids, *result.token_ids))
        assert_greedy(theirs, len(request.prompt_token_ids), result.token_ids, tolerance=1e-3)


def test_thirty_two_concurrent_requests_answer_as_alone(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    before = sha256(tiny_base)
    adapters, requests = library(tiny_base), requests_of_all_kinds(tiny_base, 32)
    model = SmolLM(tiny_base.config, tiny_base.weights, max_positions=512)
    expected = {request.request_id: alone(tiny_base, model, adapters, request) for request in requests}
    num_preemptions = 0  # their number depends on how soon adapters are read
    for seed in range(3):
        engine = build_engine(
            tiny_base, adapters, model=model, num_blocks=24, block_size=8, max_rank=40, limits=TIGHT
        )
        results = run(
            engine,
            requests,
            arrivals=random.Random(seed),
            after_step=partial(check_blocks, engine),
        )
        check_idle(engine)
        num_preemptions += engine.stats.preemptions
        assert engine.stats.adapter_evictions > 0
        engine.close()
        for (request_id, index), found in results.items():
            assert_same(found, expected[request_id][index])
    assert num_preemptions > 0
    greedy = [r for r in requests if r.sampling.temperature == 0 and r.sampling.repetition_penalty == 1]
    assert len(greedy) >= 12
    assert_follows_the_merged_model(
        tiny_base_dir, adapters, greedy, [expected[request.request_id][0] for request in greedy]
    )
    assert sha256(tiny_base) == before


def test_preemption_between_projects_does_not_change_answers(tiny_base: BaseModel) -> None:
    """Only places are scarce. A preemption gives a place to a project that has none."""
    adapters = library(tiny_base)
    requests = [
        replace(one, project="abcdefgh"[i // 2 % 8] if i % 2 else "a")
        for i, one in enumerate(requests_of_all_kinds(tiny_base, 32, seed=2))
    ]
    model = SmolLM(tiny_base.config, tiny_base.weights, max_positions=512)
    expected = {request.request_id: alone(tiny_base, model, adapters, request) for request in requests}
    limits = SchedulerLimits(max_num_seqs=4, chunk_size=8, max_prefill_tokens=32)
    engine = build_engine(tiny_base, adapters, model=model, num_blocks=400, block_size=8, limits=limits)
    results = run(engine, requests, arrivals=random.Random(3), after_step=partial(check_blocks, engine))
    check_idle(engine)
    engine.close()
    assert engine.stats.preemptions > 0
    for (request_id, index), found in results.items():
        assert_same(found, expected[request_id][index])


@pytest.mark.real
@pytest.mark.thorough  # answers compared with PEFT's: end_to_end/test_adapter_life.py and test_blends.py
def test_concurrent_requests_on_the_real_base(real_base: BaseModel, hf_base_dir: Path) -> None:
    before = sha256(real_base)
    adapters = library(real_base, 5, strength=0.03)
    tokenizer = real_base.tokenizer
    texts = ["The capital of France is", "def add(a, b):", "Once upon a time", "Dear Sir,", "2 + 2 ="]
    blends = [
        refs(**{"00": 1.0}),
        refs(**{"01": 1.0, "02": -0.5}),
        refs(**{"03": 1.0}),
        (),
        refs(**{"00": 0.5, "04": 0.5}),
    ]
    requests = [
        GenerationRequest(
            f"r{i}",
            tuple(tokenizer.encode(text * 4)),
            replace(SAMPLED if i == 4 else GREEDY, max_tokens=24),
            blend,
        )
        for i, (text, blend) in enumerate(zip(texts, blends, strict=True))
    ]
    model = SmolLM(real_base.config, real_base.weights, max_positions=128)
    engine = build_engine(
        real_base, adapters, model=model, num_blocks=6, max_rank=48, max_model_len=128, limits=TIGHT
    )
    results = run(engine, requests, arrivals=random.Random(1))
    check_idle(engine)
    assert engine.stats.preemptions > 0
    for request in requests:
        assert_same(results[request.request_id, 0], alone(real_base, model, adapters, request)[0])
    assert_follows_the_merged_model(
        hf_base_dir, adapters, requests[:4], [results[request.request_id, 0] for request in requests[:4]]
    )
    assert sha256(real_base) == before


def test_random_aborts_affect_no_other_request(tiny_base: BaseModel) -> None:
    """A third of the requests is aborted. The others' answers are correct, and everything is freed."""
    rng = random.Random(7)
    adapters = library(tiny_base)
    requests = requests_of_all_kinds(tiny_base, 30, seed=4)
    model = SmolLM(tiny_base.config, tiny_base.weights, max_positions=512)
    engine = build_engine(tiny_base, adapters, model=model, num_blocks=24, block_size=8, max_rank=40, limits=TIGHT)
    doomed = {request.request_id for request in requests if rng.random() < 0.3}
    results = {(r.request_id, i): Result() for r in requests for i in range(r.n)}
    coming = list(requests)
    steps = 0
    while coming or engine.has_work:
        if coming and rng.random() < 0.7:
            engine.add(coming.pop())
        for output in engine.step():
            results[output.request_id, output.index].take(output)
        if rng.random() < 0.2 and doomed:
            victim = rng.choice(sorted(doomed))
            if all(request.request_id != victim for request in coming):
                engine.abort(victim)
                doomed.discard(victim)
                results = {key: result for key, result in results.items() if key[0] != victim}
        engine.blocks.check(engine.scheduler.running)
        steps += 1
        assert steps < 20_000
    check_idle(engine)
    for request in requests[::5]:
        if (request.request_id, 0) in results:
            assert_same(results[request.request_id, 0], alone(tiny_base, model, adapters, request)[0])
