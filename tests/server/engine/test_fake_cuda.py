"""The engine on a fake GPU: no mixed devices, and the CPU's answers."""

import logging
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.backend import Backend
from server.engine.engine import Engine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest, Grammar, SamplingParams, SequenceOutput
from server.engine.runner import Runner
from server.engine.sampling import LogitsRow, Sampled
from server.engine.sequence import Chunk
from server.engine.sequence import Sequence as SequenceState
from server.errors import GenerationFailed
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, Results, build_engine, check_idle, refs, run
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.kits.grammars import guidance_of
from tests.server.engine.step_kit import EVERYTHING, LETTERS, PENALIZED, PLAIN, SAMPLED, rows, sharing
from tests.server.engine.traffic import TIGHT, assert_same, library, prompt, requests_of_all_kinds


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (2,))
    guidance.check(LETTERS)
    yield guidance
    guidance.close()


def both(base: BaseModel, requests: list[GenerationRequest], **options: Any) -> tuple[Results, Results, Engine]:
    """Return the answers of the CPU and of the fake GPU, with the same options."""
    adapters = library(base)
    on_cpu = build_engine(base, adapters, **options)
    expected = run(on_cpu, requests, arrivals=random.Random(0))
    on_cpu.close()
    with fake_cuda():
        engine = build_engine(on_card(base), adapters, **options)
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
    tight: dict[str, Any] = {"num_blocks": 13, "block_size": 8, "max_rank": 24, "limits": TIGHT}
    found, expected, engine = both(tiny_base, requests, **tight, loads_at_once=True)
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


def test_prefixes_are_cached(tiny_base: BaseModel) -> None:
    prefix = prompt(100)
    requests = [
        GenerationRequest(f"r{i}", (*prefix, i), replace(GREEDY, max_tokens=4), refs(**{f"{i % 2:02}": 1.0}))
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
    with fake_cuda():
        found = scores_of(build_engine(on_card(tiny_base), adapters), requests)
    for name, scores in expected.items():
        assert len(scores) > 30
        assert found[name] == pytest.approx(scores, abs=1e-4)


def test_rows_are_not_read_before_their_copy_has_ended(tiny_base: BaseModel) -> None:
    """Running sequences continue. An adapter that takes an evicted adapter's rows, which a step may still read, is
    copied after that step; otherwise the fake GPU raises TooEarly."""
    adapters = library(tiny_base)
    cold = GenerationRequest("cold", prompt(9), GREEDY, refs(**{"09": 1.0}))
    expected = run(build_engine(tiny_base, adapters), [cold])["cold", 0]
    card = Card()
    with fake_cuda(card):
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


def test_a_step_without_memory_fails_only_its_requests(tiny_base: BaseModel) -> None:
    """Later requests are answered, and a load without memory doesn't count as a corrupt adapter."""
    adapters = library(tiny_base)
    request = GenerationRequest("r", prompt(20), GREEDY)
    adapted = replace(request, request_id="a", adapters=refs(**{"04": 1.0}))
    with fake_cuda() as card:
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


class Starved(Backend):
    """A backend that runs out of memory, and an `empty_cache` that checks whether its tensor is still alive."""

    def __init__(self) -> None:
        self.hidden_ref: weakref.ref[torch.Tensor] | None = None
        self.was_alive: list[bool] = []

    def hidden(self, decodes: Sequence[Chunk], prefills: Sequence[Chunk]) -> torch.Tensor:
        hidden = torch.zeros(8)
        self.hidden_ref = weakref.ref(hidden)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("memory ran out before")

    def sample(self, hidden: torch.Tensor, rows: Sequence[LogitsRow]) -> list[Sampled]:
        raise AssertionError("memory ran out before")

    def draw(
        self, decodes: Sequence[Chunk], prefills: Sequence[Chunk], rows: Sequence[LogitsRow]
    ) -> list[Sampled]:
        return self.sample(self.hidden(decodes, prefills), rows)

    def empty_cache(self) -> None:
        assert self.hidden_ref is not None
        self.was_alive.append(self.hidden_ref() is not None)


def test_the_cache_is_emptied_once_the_steps_tensors_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    starved = Starved()
    monkeypatch.setattr(torch.cuda, "empty_cache", starved.empty_cache)
    monkeypatch.setattr(logging.getLogger("server.engine.runner"), "disabled", True)  # pytest keeps log records
    sequence = SequenceState(GenerationRequest("r", (1, 2), PLAIN), 0, 0.0, 16)
    with pytest.raises(GenerationFailed, match="memory ran out"):
        Runner(starved).run([Chunk(sequence, 0, 2)])
    assert starved.was_alive == [False]
