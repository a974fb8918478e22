"""An overflow fails the answers with the overflowing token, and doesn't affect cached tokens before it."""

from dataclasses import replace

import pytest
import torch

from adapters.errors import InvalidInput
from adapters.lora import LoraModule, LoraWeights, ModuleKey
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, build_engine, check_idle, refs, run
from tests.kits.native import native_model, tiny_of
from tests.server.engine.traffic import assert_same

HUGE = 400
"""The token whose value overflows under the adapter `spike`."""
BEFORE = tuple(range(100, 120))
SHORT = replace(GREEDY, max_tokens=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base whose embeddings are 0 in the first dimension, except HUGE's."""
    base = tiny_of(tmp_path_factory.mktemp("overflow"), "grouped")
    embed = base.weights.embed.clone()
    embed[:, 0] = 0
    embed[HUGE, 0] = 1
    return replace(base, weights=replace(base.weights, embed=embed, lm_head=embed))


def spike(base: BaseModel) -> LoraWeights:
    """A rank-1 adapter of the first v_proj that adds 0 to the values of all tokens, but infinity to HUGE's."""
    out, inputs = base.config.shape.features["v_proj"]
    a = torch.zeros(1, inputs)
    a[0, 0] = 1e3
    return LoraWeights({ModuleKey(0, "v_proj"): LoraModule(a, torch.full((out, 1), 1e38), 1.0)})


def engine_of(base: BaseModel, is_native: bool) -> Engine:
    """Return an engine. Native code reads a prompt of 21 tokens in pieces of 13 and 8, torch at once."""
    native = native_model(base) if is_native else None
    limits = SchedulerLimits(chunk_size=64, max_prefill_tokens=13)
    return build_engine(base, {"spike": spike(base)}, native=native, limits=limits)


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
def test_an_overflow_does_not_reach_the_prefix_cache(base: BaseModel, is_native: bool) -> None:
    adapters = refs(spike=1.0)
    fine = GenerationRequest("fine", BEFORE, SHORT, adapters)
    (alone,) = run(engine_of(base, is_native), [fine]).values()
    assert alone.finish_reason == "length"

    engine = engine_of(base, is_native)
    bad = GenerationRequest("bad", (*BEFORE, HUGE), SHORT, adapters)
    results = run(engine, [bad])
    error = results["bad", 0].error
    assert isinstance(error, InvalidInput)
    assert "overflowed" in str(error)
    (after,) = run(engine, [fine]).values()
    assert after.num_cached_tokens == 16
    assert_same(after, alone)
    check_idle(engine)
