"""Penalties and biases against a plain loop over floats."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, overload

import pytest
import torch

from server.engine.request import SamplingParams
from server.engine.sampling import LogitsRow
from server.engine.sequence import TokenCounts
from tests.server.engine.sampling.rows import logits_of
from tests.server.engine.sampling.samplers import Sample

PROMPT = (5, 6, 7, 5, 900)
ANSWER = (7, 8, 8, 9, 8, 999)
COUNTS = TokenCounts(PROMPT, len(PROMPT))


def by_hand(logits: Sequence[float], params: SamplingParams, biases: Mapping[int, float]) -> list[float]:
    """Compute the penalties: repetition over prompt and answer, the others over the answer alone, as OpenAI
    defines them."""
    changed = list(logits)
    for token_id in range(len(changed)):
        if token_id in PROMPT + ANSWER:
            penalty = params.repetition_penalty
            changed[token_id] = (
                changed[token_id] * penalty if changed[token_id] < 0 else changed[token_id] / penalty
            )
        count = ANSWER.count(token_id)
        changed[token_id] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
        changed[token_id] += biases.get(token_id, 0.0)
    return changed


@pytest.mark.parametrize(
    ("penalties", "biases"),
    [
        ({"presence_penalty": 1.5}, {}),
        ({"frequency_penalty": 0.7}, {}),
        ({"presence_penalty": -2.0, "frequency_penalty": -0.25}, {}),
        ({}, {0: 3.0, 8: -100.0, 999: 0.5}),
        ({"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 2.0}, {7: 4.0}),
    ],
)
def test_penalties_and_biases_of_logits(
    sample: Sample, penalties: Mapping[str, Any], biases: Mapping[int, float]
) -> None:
    params = SamplingParams(temperature=0.0, logit_bias=tuple(biases.items()), **penalties)
    logits = logits_of(3, rows=2)
    plain = logits[1].clone()
    expected = by_hand(logits[0].tolist(), params, biases)
    counts = TokenCounts((*PROMPT, *ANSWER), len(PROMPT))
    ours = LogitsRow(params, 0, 11, counts)
    other = LogitsRow(SamplingParams(temperature=0.0), 0, 11, counts)
    tokens = [sampled.token_id for sampled in sample(logits, [ours, other])]
    torch.testing.assert_close(logits[0], torch.tensor(expected), rtol=0, atol=1e-5)
    assert torch.equal(logits[1], plain)
    assert tokens == [max(range(len(expected)), key=expected.__getitem__), int(plain.argmax())]


def by_counting(token_ids: Sequence[int], num_prompt_tokens: int) -> dict[int, int]:
    answer = token_ids[num_prompt_tokens:]
    return {token_id: answer.count(token_id) for token_id in token_ids}


def test_counts_follow_a_sequence_as_it_grows() -> None:
    rng = random.Random(1)
    token_ids = rng.choices(range(50), k=100)
    counts = TokenCounts(token_ids, 100)
    for _ in range(30):
        token_ids += rng.choices(range(60), k=rng.randrange(4))
        draft = tuple(rng.choices(range(70), k=rng.randrange(5)))
        tokens, used = counts.of(draft)
        assert dict(zip(tokens.tolist(), used.tolist(), strict=True)) == by_counting([*token_ids, *draft], 100)
        assert len(set(tokens.tolist())) == len(tokens)


class Counted(Sequence[int]):
    """Token ids that count their reads."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found = self.token_ids[index]
        self.num_reads += 1 if isinstance(found, int) else len(found)
        return found


def test_each_token_is_counted_once() -> None:
    token_ids = list(range(8000))
    token_reads = Counted(token_ids)
    row = LogitsRow(
        SamplingParams(repetition_penalty=1.1, frequency_penalty=0.5), 0, 0, TokenCounts(token_reads, 8000)
    )
    assert row.penalized.seen.size == 8000
    assert token_reads.num_reads <= 2 * 8000
    for token_id in range(20):
        token_reads.num_reads = 0
        token_ids.append(token_id)
        penalized = row.penalized
        assert penalized.penalties.tolist() == [0.5] * (token_id + 1)
        assert token_reads.num_reads <= 2


def test_a_penalty_waits_for_the_first_token(sample: Sample) -> None:
    logits = logits_of(4)
    plain = logits.clone()
    sample(logits, [LogitsRow(SamplingParams(temperature=0.0, presence_penalty=2.0), 0, 5, COUNTS)])
    assert torch.equal(logits, plain)


def test_log_probabilities_are_the_models(sample: Sample) -> None:
    """They are of the logits before anything is added."""
    logits = logits_of(5)
    expected = logits[0].log_softmax(-1)
    params = SamplingParams(temperature=0.0, logit_bias=((17, 100.0),), logprobs=2)
    (sampled,) = sample(logits, [LogitsRow(params, 0, 5, COUNTS)])
    assert sampled.token_id == 17
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen == pytest.approx(float(expected[17]))
    assert [token_id for token_id, _ in sampled.logprobs.top] == expected.topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1)]
)
def test_requests_without_penalties_are_recognized(field: str, value: float) -> None:
    assert not SamplingParams().changes_logits
    params: dict[str, Any] = {field: value}
    assert SamplingParams(**params).changes_logits
    assert SamplingParams(logit_bias=((1, 1.0),)).changes_logits
