"""Scores of given tokens compared with Hugging Face's log-softmax, in any chunks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.errors import InvalidInput
from adapters.lora import AdapterRef, LoraWeights
from server.engine.engine import Engine
from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.engine.sampling import log_totals
from server.engine.scheduler import SchedulerLimits
from server.errors import GenerationFailed
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, build_engine, check_idle, refs, run
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.engine.faults import overflowing
from tests.server.engine.traffic import assert_same, library, prompt

SCORING = SamplingParams(max_tokens=0, temperature=0.0)


def scoring(
    name: str, num_tokens: int, scored_from: int, adapters: tuple[AdapterRef, ...] = (), seed: int = 0
) -> GenerationRequest:
    return GenerationRequest(name, prompt(num_tokens, seed), SCORING, adapters, scored_from=scored_from)


def score(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, tuple[float, ...]]:
    """Return the scores of all requests, run concurrently."""
    for request in requests:
        engine.check(request)
        engine.add(request)
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert (output.finish_reason, output.text, output.num_output_tokens) == ("length", "", 0), output
            found[output.request_id] = output.scores
    check_idle(engine)
    return found


def reference(base_dir: Path, request: GenerationRequest, adapters: dict[str, LoraWeights]) -> list[float]:
    first = request.scored_from
    assert first is not None
    with merged(
        load_reference(base_dir), [(adapters[ref.digest], ref.weight) for ref in request.adapters]
    ) as model:
        rows = logits(model, request.prompt_token_ids).log_softmax(-1)
    token_ids = request.prompt_token_ids
    return [float(rows[position - 1, token_ids[position]]) for position in range(first, len(token_ids))]


def test_scores_are_hugging_faces(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """One token, or all but the first; within a chunk, across its borders, and with a last chunk of one token."""
    adapters = library(tiny_base, 3)
    sets = [(), refs(**{"00": 1.0}), refs(**{"01": -0.5, "02": 0.7})]
    requests = [
        scoring(f"{length}-{first}-{number}", length, first, used, seed=length)
        for number, used in enumerate(sets)
        for length, first in ((2, 1), (30, 29), (64, 1), (65, 50), (66, 65), (130, 20))
    ]
    found = score(build_engine(tiny_base, adapters), requests)
    for request in requests:
        expected = reference(tiny_base_dir, request, adapters)
        assert found[request.request_id] == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_tokens(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """Each request gets its own number, and none for a neighbour in the same step."""
    plain, detailed = scoring("plain", 40, 3, seed=1), scoring("detailed", 90, 20, seed=2)
    engine = build_engine(tiny_base)
    for request in (plain, replace(detailed, sampling=replace(SCORING, logprobs=3))):
        engine.add(request)
    found: dict[str, SequenceOutput] = {}
    while engine.has_work:
        found |= {output.request_id: output for output in engine.step()}
    assert found["plain"].logprobs == ()
    rows = logits(load_reference(tiny_base_dir), detailed.prompt_token_ids).log_softmax(-1)[19:-1]
    best = rows.topk(3)
    entries = found["detailed"].logprobs
    assert [entry.chosen.token_id for entry in entries] == list(detailed.prompt_token_ids[20:])
    assert tuple(entry.chosen.logprob for entry in entries) == found["detailed"].scores
    assert [[token.token_id for token in entry.top] for entry in entries] == best.indices.tolist()
    values = [[token.logprob for token in entry.top] for entry in entries]
    assert torch.tensor(values).numpy() == pytest.approx(best.values.numpy(), abs=1e-4)


def test_the_total_of_a_large_vocabulary_has_the_same_bits_in_any_number_of_rows() -> None:
    logits = torch.randn(200, 49152, generator=torch.Generator().manual_seed(0)) * 5
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = log_totals(logits)
        for size in (1, 2, 3):
            apart = torch.cat([log_totals(part.clone()) for part in logits.split(size)])
            assert torch.equal(apart, together)
    finally:
        torch.set_num_threads(num_threads)


def test_a_cached_prefix_changes_nothing(tiny_base: BaseModel) -> None:
    """Cached tokens are computed again if their successors are to be scored."""
    engine = build_engine(tiny_base)
    request = scoring("a", 100, 40)
    (first,) = score(engine, [request]).values()
    assert engine.stats.prefix_cached_tokens == 0
    (second,) = score(engine, [replace(request, request_id="b")]).values()
    assert engine.stats.prefix_cached_tokens == 32  # the full blocks of the first 39
    assert second == pytest.approx(first, abs=1e-5)
    (last,) = score(engine, [replace(request, request_id="c", scored_from=99)]).values()
    assert last == pytest.approx(first[-1:], abs=1e-5)


def test_a_text_that_fills_the_cache(tiny_base: BaseModel) -> None:
    """It needs no room for a next token, and gets its turn alongside a project that fills the batch."""
    engine = build_engine(tiny_base, num_blocks=4, limits=SchedulerLimits(max_num_seqs=2, max_bypass=1))
    for n in range(3):
        engine.add(GenerationRequest(f"g{n}", prompt(10, seed=n), GREEDY, project="many"))
    engine.step()
    request = replace(scoring("full", 64, 60, seed=3), project="one")
    engine.check(request)
    engine.add(request)
    found = [output for _ in range(70) for output in engine.step() if output.scores]
    check_idle(engine)
    (alone,) = score(build_engine(tiny_base), [request]).values()
    assert [output.scores for output in found] == [pytest.approx(alone, abs=1e-5)]


def test_scores_survive_preemption(tiny_base: BaseModel) -> None:
    limits = SchedulerLimits(chunk_size=4, max_prefill_tokens=8)
    tight = build_engine(tiny_base, num_blocks=16, block_size=4, limits=limits)
    generating = [GenerationRequest(f"g{n}", prompt(4, seed=n), replace(GREEDY, max_tokens=30)) for n in range(2)]
    for request in generating:
        tight.add(request)
    request = scoring("s", 40, 10, seed=9)
    tight.add(request)
    found: tuple[float, ...] = ()
    while tight.has_work:
        for output in tight.step():
            found += output.scores
    assert tight.stats.preemptions
    (expected,) = score(build_engine(tiny_base), [request]).values()
    assert found == pytest.approx(expected, abs=1e-5)


def test_scoring_does_not_affect_concurrent_generation(tiny_base: BaseModel) -> None:
    adapters = library(tiny_base, 2)
    requests = [GenerationRequest(f"g{n}", prompt(20, n), GREEDY, refs(**{f"{n % 2:02}": 1.0})) for n in range(4)]
    alone = run(build_engine(tiny_base, adapters), requests)
    engine = build_engine(tiny_base, adapters)
    for number in range(4):
        engine.add(scoring(f"s{number}", 90, 10, refs(**{"00": 1.0}), seed=50 + number))
    results: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            results.setdefault(output.request_id, []).extend(e.chosen.token_id for e in output.logprobs)
    for (name, _), result in alone.items():
        assert results[name] == result.token_ids
    assert all(not results[f"s{number}"] for number in range(4))


def test_scores_that_overflow_under_adapters_are_invalid_input(tiny_base: BaseModel) -> None:
    adapters = library(tiny_base, 1)
    engine = build_engine(tiny_base, adapters)
    engine.add(scoring("a", 20, 5, refs(**{"00": 1e30})))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    error = outputs[-1].error
    assert isinstance(error, InvalidInput)
    assert [fault.loc for fault in error.errors] == [("adapter",)]
    assert outputs[-1].finish_reason == "abort"


def test_scores_that_overflow_in_the_base_are_a_server_error(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, model=overflowing(tiny_base))
    engine.add(scoring("a", 20, 5))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert isinstance(outputs[-1].error, GenerationFailed)


def test_generating_after_scoring_uses_its_cached_blocks(tiny_base: BaseModel) -> None:
    """Blocks computed for scores are shared like any other prefix."""
    engine = build_engine(tiny_base)
    score(engine, [scoring("s", 50, 10)])
    found = run(engine, [GenerationRequest("g", prompt(50), GREEDY)])["g", 0]
    assert found.num_cached_tokens == 48
    assert_same(found, run(build_engine(tiny_base), [GenerationRequest("g", prompt(50), GREEDY)])["g", 0])


def together(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, list[SequenceOutput]]:
    """Return the outputs of all requests, run concurrently."""
    for request in requests:
        engine.check(request)
        engine.add(request)
    found: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    check_idle(engine)
    return found


def assert_scored_and_answered(
    outputs: Sequence[SequenceOutput], scores: Sequence[float], token_ids: Sequence[int]
) -> None:
    """The first output has the scores and the scored tokens' log-probabilities; no other output has any."""
    first, *others = outputs
    assert first.scores == pytest.approx(scores, abs=1e-5)
    assert tuple(entry.chosen.logprob for entry in first.logprobs[:-1]) == first.scores
    assert [(output.scores, len(output.logprobs)) for output in others] == [((), 1)] * len(others)
    assert [output.logprobs[-1].chosen.token_id for output in outputs] == list(token_ids)
    assert outputs[-1].num_output_tokens == len(token_ids)


def test_a_prompt_is_scored_and_continued(tiny_base: BaseModel) -> None:
    """The scores are those of scoring alone, and the tokens are those of generating alone."""
    adapters = library(tiny_base, 1)
    used = refs(**{"00": 0.7})
    lengths = (1, 2, 64, 65, 130)
    requests = [GenerationRequest(f"{n}", prompt(n, n), GREEDY, used, scored_from=1) for n in lengths]
    found = together(build_engine(tiny_base, adapters), requests)
    answers = run(build_engine(tiny_base, adapters), [replace(request, scored_from=None) for request in requests])
    scores = score(build_engine(tiny_base, adapters), [replace(request, sampling=SCORING) for request in requests])
    for request in requests:
        name = request.request_id
        assert_scored_and_answered(found[name], scores[name], answers[name, 0].token_ids)


def test_scores_are_returned_once_after_a_preemption(tiny_base: BaseModel) -> None:
    limits = SchedulerLimits(chunk_size=4, max_prefill_tokens=8)
    tight = build_engine(tiny_base, num_blocks=16, block_size=4, limits=limits)
    long = replace(GREEDY, max_tokens=30)
    requests = [GenerationRequest(f"{n}", prompt(12, seed=n), long, scored_from=4) for n in range(3)]
    found = together(tight, requests)
    assert tight.stats.preemptions
    scores = score(build_engine(tiny_base), [replace(request, sampling=SCORING) for request in requests])
    answers = run(build_engine(tiny_base), [replace(request, scored_from=None) for request in requests])
    for request in requests:
        name = request.request_id
        assert_scored_and_answered(found[name], scores[name], answers[name, 0].token_ids)


def test_a_prompt_may_be_computed_without_scores_and_answer(tiny_base: BaseModel) -> None:
    (outputs,) = together(build_engine(tiny_base), [GenerationRequest("a", prompt(20), SCORING)]).values()
    assert [(output.text, output.scores, output.finish_reason) for output in outputs] == [("", (), "length")]
