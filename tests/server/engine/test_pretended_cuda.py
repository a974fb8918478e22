"""The engine over a pretended card: no mixed devices, the CPU's answers, and few waits and kernels a step."""

import logging
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from server.engine.engine import Engine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest, Grammar, SamplingParams, SequenceOutput
from server.engine.runner import Runner
from server.engine.scheduler import Chunk
from server.engine.sequence import Sequence as SequenceState
from server.errors import GenerationFailed
from server.model.weights import BaseModel
from tests.engine_kit import GREEDY, Results, build_engine, check_idle, refs, run
from tests.grammars import guidance_of
from tests.pretended.card import Card
from tests.pretended.cuda import on_card, pretended_cuda
from tests.server.engine.traffic import TIGHT, assert_same, library, prompt, requests_of_all_kinds

NUM_ROWS = 8
LETTERS = Grammar("regex", "[a-z ]{40}")
PLAIN = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SAMPLED = replace(PLAIN, temperature=0.8, top_p=0.9, min_p=0.01)
PENALIZED = replace(
    PLAIN, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((5, 1.0), (9, -1.0))
)
EVERYTHING = replace(PENALIZED, temperature=1.5, top_p=0.999, min_p=0.001, logprobs=5, ignore_eos=False)


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (2,))
    guidance.check(LETTERS)
    yield guidance
    guidance.close()


def decoding(engine: Engine, requests: list[GenerationRequest]) -> None:
    """Step until every request is generating, and once more."""
    for request in requests:
        engine.check(request)
        engine.add(request)
    running = engine.scheduler.running
    while len(running) < len(requests) or not all(sequence.is_decoding for sequence in running):
        engine.step()
    engine.step()


def rows(
    sampling: SamplingParams = PLAIN, *, num_parts: int = 0, grammar: Grammar | None = None
) -> list[GenerationRequest]:
    """As many requests, each with its own prompt, seed and adapters."""
    found = []
    for i in range(NUM_ROWS):
        parts = {f"{(i + part) % 16:02}": 1.0 / num_parts for part in range(num_parts)}
        found.append(
            GenerationRequest(
                f"r{i}", prompt(20 + i, seed=i), replace(sampling, seed=i), refs(**parts), grammar=grammar
            )
        )
    return found


def sharing(sampling: SamplingParams) -> list[GenerationRequest]:
    """The same under one adapter, each asking for another number of likely tokens."""
    return [
        replace(
            request,
            adapters=refs(**{"00": 1.0}),
            sampling=replace(request.sampling, logprobs=i % 4, top_k=(0, 3, 300, 511)[i % 4]),
        )
        for i, request in enumerate(rows(sampling))
    ]


@pytest.mark.parametrize(
    ("requests", "num_waits", "num_kernels"),
    [
        pytest.param(rows(), 1, 126, id="plain"),
        pytest.param(rows(num_parts=1), 1, 201, id="mixed"),
        pytest.param(rows(num_parts=2), 1, 213, id="blends"),
        pytest.param(rows(replace(SAMPLED, top_k=50)), 1, 168, id="sampled"),
        pytest.param(rows(SAMPLED), 2, 175, id="top-p alone"),
        pytest.param(rows(PENALIZED), 1, 138, id="penalties"),
        pytest.param(rows(replace(PLAIN, logprobs=5)), 2, 132, id="logprobs"),
        pytest.param(rows(replace(PLAIN, ignore_eos=False), grammar=LETTERS), 1, 134, id="grammar"),
        pytest.param(sharing(SAMPLED), 3, 271, id="many kinds"),
        pytest.param(rows(EVERYTHING, num_parts=1, grammar=LETTERS), 3, 276, id="everything"),
    ],
)
def test_what_a_decode_step_costs(
    tiny_base: BaseModel,
    guidance: Guidance,
    requests: list[GenerationRequest],
    num_waits: int,
    num_kernels: int,
) -> None:
    """Waits don't grow with rows or layers, of which there are 8 and 3; of kernels a layer of the base has 37."""
    with pretended_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base), guidance=guidance)
        decoding(engine, requests)
        for _ in range(3):
            card.main.clear()
            engine.step()
            assert card.main.num_waits <= num_waits, card.main.waits
            assert card.main.num_kernels <= num_kernels, card.main.kernels
        assert len(engine.scheduler.running) == NUM_ROWS
        engine.close()


def test_values_are_multiplied_not_summed_position_by_position(tiny_base: BaseModel) -> None:
    """A GPU's kernel for bags walks through each of them in one thread: bags of positions are too long for it."""
    with pretended_cuda() as card:
        engine = build_engine(on_card(tiny_base))
        decoding(engine, rows())
        card.main.clear()
        engine.step()
        engine.close()
    assert not [name for name in card.main.kernels if "embedding_bag" in name]
    assert card.main.kernels["aten::bmm"] == 2 * tiny_base.config.num_layers


def test_a_step_that_reads_prompts_scores_and_decodes_waits_twice(tiny_base: BaseModel) -> None:
    """For the scores of 90 tokens, and for the next tokens."""
    with pretended_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base))
        decoding(engine, rows(replace(PLAIN, max_tokens=30), num_parts=1))
        scored = GenerationRequest("scored", prompt(60, seed=1), SamplingParams(max_tokens=0), scored_from=1)
        for request in (scored, replace(scored, request_id="other", adapters=refs(**{"01": 1.0}))):
            engine.add(request)
        engine.add(GenerationRequest("read", prompt(60, seed=2), PLAIN))
        while engine.scheduler.num_waiting:
            card.main.clear()
            engine.step()
            assert card.main.num_waits <= 2, card.main.waits
        engine.close()


def both(base: BaseModel, requests: list[GenerationRequest], **options: object) -> tuple[Results, Results, Engine]:
    """What the CPU answers, and what the pretended card does, with the same engine's options."""
    adapters = library(base)
    on_cpu = build_engine(base, adapters, **options)  # type: ignore[arg-type]
    expected = run(on_cpu, requests, arrivals=random.Random(0))
    on_cpu.close()
    with pretended_cuda():
        engine = build_engine(on_card(base), adapters, **options)  # type: ignore[arg-type]
        found = run(engine, requests, arrivals=random.Random(0))
        engine.close()
    check_idle(engine)
    return found, expected, engine


def assert_all_same(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for key, result in expected.items():
        assert_same(found[key], result)


def test_all_kinds_of_requests_with_preemptions_and_evictions(tiny_base: BaseModel) -> None:
    requests = requests_of_all_kinds(tiny_base, 9)
    found, expected, engine = both(tiny_base, requests, num_blocks=13, block_size=8, max_rank=24, limits=TIGHT)
    assert_all_same(found, expected)
    assert engine.stats.preemptions > 0
    assert engine.stats.adapter_evictions > 0


def test_structured_and_penalized_answers(tiny_base: BaseModel, guidance: Guidance) -> None:
    grammar = Grammar("regex", "[a-d]{3,12}")
    guidance.check(grammar)
    requests = [
        *rows(replace(EVERYTHING, max_tokens=24), num_parts=2, grammar=grammar),
        *(replace(request, request_id=f"p{i}") for i, request in enumerate(rows(PENALIZED, num_parts=1))),
        *(replace(request, request_id=f"s{i}") for i, request in enumerate(sharing(SAMPLED))),
    ]
    found, expected, _ = both(tiny_base, requests, guidance=guidance, num_blocks=512)
    assert_all_same(found, expected)
    assert any(result.finish_reason == "stop" for result in found.values())


def test_prefixes_are_found_again(tiny_base: BaseModel) -> None:
    shared = prompt(100)
    requests = [
        GenerationRequest(f"r{i}", (*shared, i), replace(GREEDY, max_tokens=4), refs(**{f"{i % 2:02}": 1.0}))
        for i in range(6)
    ]
    found, expected, engine = both(tiny_base, requests)
    assert_all_same(found, expected)
    assert engine.stats.prefix_cached_tokens > 0


def scores_of(engine: Engine, requests: list[GenerationRequest]) -> dict[str, tuple[float, ...]]:
    outputs: list[SequenceOutput] = []
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    return {output.request_id: output.scores for output in outputs}


def test_scores(tiny_base: BaseModel) -> None:
    sampling = SamplingParams(max_tokens=0)
    requests = [
        GenerationRequest(f"s{i}", prompt(90, seed=i), sampling, refs(**{f"{i:02}": 0.5}), scored_from=1 + 9 * i)
        for i in range(4)
    ]
    adapters = library(tiny_base)
    expected = scores_of(build_engine(tiny_base, adapters), requests)
    with pretended_cuda():
        found = scores_of(build_engine(on_card(tiny_base), adapters), requests)
    for name, scores in expected.items():
        assert len(scores) > 30
        assert found[name] == pytest.approx(scores, abs=1e-4)


def test_an_adapter_comes_in_one_copy_a_pool(tiny_base: BaseModel) -> None:
    """Of A and of B of four groups, pinned: only the thread that loads it waits, once, for the last of them."""
    with pretended_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base))
        decoding(engine, rows(replace(PLAIN, max_tokens=200)))
        card.main.clear()
        engine.add(GenerationRequest("cold", prompt(9), PLAIN, refs(**{"04": 1.0})))
        while engine.stats.num_waiting:
            engine.step()
        engine.close()
    assert card.pools.num_uploads == 8
    assert [what for what, _ in card.pools.waits.elements()] == ["event"]


def test_rows_are_not_read_before_their_copy_has_ended(tiny_base: BaseModel) -> None:
    """What runs goes on meanwhile; an adapter that takes an evicted one's rows, while a step may still read them,
    comes after that step: the card raises TooEarly otherwise."""
    adapters = library(tiny_base)
    cold = GenerationRequest("cold", prompt(9), GREEDY, refs(**{"09": 1.0}))
    expected = run(build_engine(tiny_base, adapters), [cold])["cold", 0]
    card = Card()
    with pretended_cuda(card):
        engine = build_engine(on_card(tiny_base), adapters, max_rank=3)
        first = run(engine, [replace(cold, request_id="first", adapters=refs(**{"04": 1.0}))])
        assert first["first", 0].finish_reason == "length"
        for request in rows(replace(PLAIN, max_tokens=100))[:2]:
            engine.add(request)
        card.gate.clear()
        engine.add(replace(cold, sampling=replace(cold.sampling, logprobs=1)))
        outputs = [output for _ in range(60) for output in engine.step()]
        assert {output.request_id for output in outputs} == {"r0", "r1"}
        assert engine.stats.num_waiting == 1
        assert "09" not in engine.pool.resident
        card.gate.set()
        outputs = []
        while not any(output.request_id == "cold" and output.finish_reason for output in outputs):
            outputs += engine.step()
        engine.close()
    tokens = [output.logprobs[0].chosen.token_id for output in outputs if output.request_id == "cold"]
    assert tokens == expected.token_ids
    assert engine.stats.adapter_evictions == 1


def test_a_step_without_memory_fails_its_requests_and_begins_anew(tiny_base: BaseModel) -> None:
    """The next ones are answered; a load without memory is no damaged adapter."""
    adapters = library(tiny_base)
    request = GenerationRequest("r", prompt(20), GREEDY)
    adapted = replace(request, request_id="a", adapters=refs(**{"04": 1.0}))
    with pretended_cuda() as card:
        engine = build_engine(on_card(tiny_base), adapters)
        card.is_full = True
        failed = run(engine, [request])["r", 0]
        assert isinstance(failed.error, GenerationFailed)
        assert "memory ran out" in str(failed.error)
        assert card.num_emptied == 1
        cold = run(engine, [adapted])["a", 0]
        assert isinstance(cold.error, GenerationFailed)
        assert "no memory" in str(cold.error)
        card.is_full = False
        found = run(engine, [request, adapted])
        engine.close()
    assert_all_same(found, run(build_engine(tiny_base, adapters), [request, adapted]))


class Starved:
    """A forward that holds a tensor when memory runs out, and a cache that looks whether it is still held."""

    def __init__(self) -> None:
        self.held: weakref.ref[torch.Tensor] | None = None
        self.was_held: list[bool] = []

    def hidden(self, decodes: Sequence[Chunk], prefills: Sequence[Chunk]) -> torch.Tensor:
        hidden = torch.zeros(8)
        self.held = weakref.ref(hidden)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def empty_cache(self) -> None:
        assert self.held is not None
        self.was_held.append(self.held() is not None)


def test_the_cache_is_emptied_once_the_steps_tensors_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    starved = Starved()
    monkeypatch.setattr(torch.cuda, "empty_cache", starved.empty_cache)
    monkeypatch.setattr(logging.getLogger("server.engine.runner"), "disabled", True)  # pytest keeps what is logged
    sequence = SequenceState(GenerationRequest("r", (1, 2), PLAIN), 0, 0.0, 16)
    with pytest.raises(GenerationFailed, match="memory ran out"):
        Runner(starved).run([Chunk(sequence, 0, 2)])
    assert starved.was_held == [False]
