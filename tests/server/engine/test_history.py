"""The native backend: a request's bits don't depend on earlier computations."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.native.model import NativeModel
from tests.kits.engines import GREEDY, Result, build_engine, random_adapter, refs, run
from tests.kits.native import native_model
from tests.kits.tiny import save_tiny_base

LENGTHS = (5, 33, 70, 130)
BLENDS: tuple[dict[str, float], ...] = ({}, {"a": 1.0}, {"a": 0.7, "b": -0.3})
SAMPLINGS = (GREEDY, replace(GREEDY, temperature=0.8, top_p=0.9, seed=3))
NUM_TOKENS = 24


class History:
    """Engines over one base, and the answers of fresh engines."""

    def __init__(self, base: BaseModel, num_tokens: int, strength: float) -> None:
        self.base, self.native = base, native_model(base)
        shape = base.config.shape
        self.adapters: Mapping[str, LoraWeights] = {
            name: random_adapter(shape, seed, rank=rank, strength=strength)
            for seed, (name, rank) in enumerate({"a": 16, "b": 3}.items())
        }
        self.requests = [
            GenerationRequest(
                f"{length}-{blend}-{sampling}",
                tuple(random.Random(length).choices(range(100, 500), k=length)),
                replace(SAMPLINGS[sampling], max_tokens=num_tokens),
                refs(**BLENDS[blend]),
            )
            for length in LENGTHS
            for blend in range(len(BLENDS))
            for sampling in range(len(SAMPLINGS))
        ]
        self.cold = self.answers(self.requests)

    def engine(self, num_blocks: int = 256, **limits: int) -> Engine:
        native: NativeModel = self.native
        return build_engine(
            self.base, self.adapters, native=native, num_blocks=num_blocks, limits=SchedulerLimits(**limits)
        )

    def answers(self, requests: Sequence[GenerationRequest]) -> list[Result]:
        """Return the answers of requests that each run on a new engine."""
        return [run(self.engine(), [request])[request.request_id, 0] for request in requests]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    directory = save_tiny_base(tmp_path_factory.mktemp("history") / "tiny", options=sizes, seed=4)
    base = load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)
    return History(base, NUM_TOKENS, strength=0.3)


def check(found: Sequence[Result], expected: Sequence[Result]) -> None:
    """Check tokens and log-probabilities bit for bit."""
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.logprobs, one.text) == (other.token_ids, other.logprobs, other.text)


def ordered(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Result]:
    """Return the results of requests that run together."""
    found = run(engine, requests)
    return [found[request.request_id, 0] for request in requests]


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 50, 512])
def test_prompts_in_any_chunks(history: History, num_tokens: int) -> None:
    """A step has a limit on prompt tokens, so its last prompt is cut anywhere."""
    engine = history.engine(max_prefill_tokens=num_tokens)
    check(ordered(engine, history.requests), history.cold)
    num_prompt_tokens = sum(len(request.prompt_token_ids) for request in history.requests)
    assert engine.num_steps > num_prompt_tokens / (num_tokens + engine.config.scheduler.max_num_seqs)


def check_repeats(history: History) -> None:
    engine = history.engine()
    for _ in range(2):
        found = [run(engine, [request])[request.request_id, 0] for request in history.requests]
        check(found, history.cold)
    assert [result.num_cached_tokens for result in found] == [
        (len(request.prompt_token_ids) - 1) // 16 * 16 for request in history.requests
    ]


def check_second_turns(history: History) -> None:
    """Check second turns over the blocks of an answer, which were written token by token."""
    engine = history.engine()
    first = ordered(engine, history.requests)
    check(first, history.cold)
    turns = [
        replace(request, prompt_token_ids=(*request.prompt_token_ids, *answer.token_ids, 7, 8, 9))
        for request, answer in zip(history.requests, first, strict=True)
    ]
    second = [run(engine, [turn])[turn.request_id, 0] for turn in turns]
    for result, request, answer in zip(second, history.requests, first, strict=True):
        num_known = len(request.prompt_token_ids) + len(answer.token_ids) - 1  # the last token was never an input
        assert result.num_cached_tokens >= num_known // 16 * 16
    check(second, history.answers(turns))


def test_exact_repeats_over_a_cached_prefix(history: History) -> None:
    check_repeats(history)


def test_second_turns_over_decoded_tokens(history: History) -> None:
    check_second_turns(history)


def test_preempted_sequences_are_computed_again(history: History) -> None:
    num_preemptions = 0  # their number depends on how soon adapters are read
    for num_blocks in (11, 13, 16, 18):
        engine = history.engine(num_blocks=num_blocks, max_num_seqs=16)
        check(ordered(engine, history.requests), history.cold)
        num_preemptions += engine.stats.preemptions
    assert num_preemptions > 0


@pytest.mark.real
@pytest.mark.thorough  # a tiny base above; end_to_end/test_native_parity.py has a server with a history
def test_history_changes_nothing_on_the_real_base(base_dir: Path) -> None:
    history = History(load_base(base_dir), 20, strength=0.03)
    check_repeats(history)
    check_second_turns(history)
    check(ordered(history.engine(max_prefill_tokens=50), history.requests), history.cold)
