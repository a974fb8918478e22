"""The number of prompt tokens in steps with decoding sequences, learnt from steps' times."""

import random
from dataclasses import replace

import pytest

from server.engine.cost_model import PromptRoom
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sequence import Chunk, Sequence


def chunks(num_decoding: int, num_prompt_tokens: int) -> list[Chunk]:
    """Return chunks of decoding sequences and of one prompt."""
    request = GenerationRequest("r", tuple(range(1000)), SamplingParams())
    decodes = [Chunk(Sequence(request, i, 0.0, 16), 5, 6) for i in range(num_decoding)]
    reads = [Chunk(Sequence(request, 0, 0.0, 16), 0, num_prompt_tokens)] if num_prompt_tokens else []
    return [*decodes, *reads]


@pytest.mark.parametrize("share", [0.3, 0.71, 0.9])
@pytest.mark.parametrize(("step", "token"), [(0.005, 0.0003), (0.02, 0.0002), (0.005, 0.00005)])
def test_prompts_take_their_share_of_a_step(step: float, token: float, share: float) -> None:
    rng, room = random.Random(1), PromptRoom(32, share)
    for _ in range(300):
        num_tokens = rng.choice((0, 0, room.with_decodes(4)))
        room.observe(chunks(4, num_tokens), (step + token * num_tokens) * rng.uniform(0.95, 1.05))
    prompts = token * room.with_decodes(4)
    if room.with_decodes(4) > 16:  # the least that a step reads
        assert prompts / (step + prompts) == pytest.approx(share, abs=0.05)
    assert room.with_decodes(4) > 16 or share == 0.3


@pytest.mark.parametrize("num_drafted", [4, 12])
def test_the_cost_of_prompts_is_learnt_from_steps_with_drafts(num_drafted: int) -> None:
    """The baseline, a step without prompts, also has drafts."""
    rng, room = random.Random(2), PromptRoom(32, 0.71)
    token, draft_token = 0.0001, 0.0004
    for _ in range(300):
        num_tokens = rng.choice((0, 0, room.with_decodes(1)))
        drafted = rng.choice((num_drafted, num_drafted - 1))
        decode, *reads = chunks(1, num_tokens)
        seconds = 0.005 + draft_token * drafted + token * num_tokens
        room.observe([replace(decode, draft=(7,) * drafted), *reads], seconds * rng.uniform(0.95, 1.05))
    step = 0.005 + draft_token * num_drafted
    prompts = token * room.with_decodes(1)
    assert prompts / (step + prompts) == pytest.approx(0.71, abs=0.05)


def test_some_prompt_tokens_are_computed_on_any_machine() -> None:
    room = PromptRoom(8, 0.71)
    for number in range(300):
        room.observe(chunks(1, number % 2 * 16), 0.005 + number % 2 * 1.0)
    assert room.with_decodes(1) == 16


def test_steps_without_decodes_do_not_change_the_share() -> None:
    room = PromptRoom(8, 0.71)
    before = room.with_decodes(1)
    for _ in range(100):
        room.observe(chunks(0, 512), 5.0)
    assert room.with_decodes(1) == before


def test_a_delayed_step_counts_little() -> None:
    room = PromptRoom(8, 0.71)
    for _ in range(100):
        room.observe(chunks(0, 100), 0.1)
    assert room.within(0.04) == pytest.approx(40, abs=1)
    assert room.within(0.04, num_decoding=8) == pytest.approx(32, abs=1)
    room.observe(chunks(0, 20), 0.9)
    assert room.within(0.04) >= 30


def test_prompts_fit_beside_decodes_that_cost_more_than_their_tokens() -> None:
    """20 sequences under adapters take 25 ms, and a prompt's token 0.5 ms: 30 of them fit into 40 ms."""
    room = PromptRoom(32, 0.71)
    assert room.within(0.04, 20) == 20, "as assumed at first"
    for number in range(300):
        room.observe(chunks(0, 64), 64 * 0.0005)
        room.observe(chunks(20, number % 2 * 40), 0.025 + number % 2 * 40 * 0.0005)
    assert room.within(0.04, 20) == pytest.approx(30, abs=3)  # 60 by the number of tokens
    assert room.within(0.04) == pytest.approx(80, abs=3)
