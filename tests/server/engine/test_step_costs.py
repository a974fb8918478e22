"""The cost of a step on a GPU: the host's waits and copies."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest, SamplingParams
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine, refs
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.kits.grammars import guidance_of
from tests.server.engine.step_kit import (
    EVERYTHING,
    LETTERS,
    NUM_ROWS,
    PENALIZED,
    PLAIN,
    SAMPLED,
    decoding,
    rows,
    sharing,
)
from tests.server.engine.traffic import library, prompt


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (2,))
    guidance.check(LETTERS)
    yield guidance
    guidance.close()


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
def test_the_cost_of_a_decode_step(
    tiny_base: BaseModel,
    guidance: Guidance,
    requests: list[GenerationRequest],
    num_waits: int,
    num_kernels: int,
) -> None:
    """The number of waits doesn't depend on rows (8) or layers (3). A layer of the base has 37 kernels."""
    with fake_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base), guidance=guidance, loads_at_once=True)
        decoding(engine, requests)
        for _ in range(3):
            card.main.clear()
            engine.step()
            assert card.main.num_waits <= num_waits, card.main.waits
            assert card.main.num_kernels <= num_kernels, card.main.kernels
        assert len(engine.scheduler.running) == NUM_ROWS
        engine.close()


def test_values_are_multiplied_not_summed_position_by_position(tiny_base: BaseModel) -> None:
    """A GPU's kernel for bags uses one thread per bag: bags of positions are too long for it."""
    with fake_cuda() as card:
        engine = build_engine(on_card(tiny_base))
        decoding(engine, rows())
        card.main.clear()
        engine.step()
        engine.close()
    assert not [name for name in card.main.kernels if "embedding_bag" in name]
    assert card.main.kernels["aten::bmm"] == 2 * tiny_base.config.num_layers


def test_a_step_that_reads_prompts_scores_and_decodes_waits_twice(tiny_base: BaseModel) -> None:
    """It waits for the scores of 90 tokens, and for the next tokens."""
    with fake_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base), loads_at_once=True)
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


def test_an_adapter_is_copied_once_per_pool(tiny_base: BaseModel) -> None:
    """A and B of four groups are copied from pinned memory. Only the loading thread waits, once, for the last
    copy."""
    with fake_cuda() as card:
        engine = build_engine(on_card(tiny_base), library(tiny_base))
        decoding(engine, rows(replace(PLAIN, max_tokens=200)))
        card.main.clear()
        engine.add(GenerationRequest("cold", prompt(9), PLAIN, refs(**{"04": 1.0})))
        while engine.stats.num_waiting:
            engine.step()
        engine.close()
    assert card.pools.num_uploads == 8
    assert [what for what, _ in card.pools.waits.elements()] == ["event"]
