"""Filters, penalties and log-probabilities against those of transformers."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
)

from server.engine.sampling import LogitsRow, _candidates, _min_p
from tests.kits.properties import num_examples
from tests.server.engine.sampling.rows import VOCAB, kept_by_transformers, logits_of, row
from tests.server.engine.sampling.samplers import Sample


def kept(logits: torch.Tensor, one: LogitsRow) -> set[int]:
    """Return the tokens that the row's filters leave."""
    scaled = logits / one.params.temperature
    ((_, scores, token_ids),) = _candidates(scaled[None], [one])
    scores = _min_p(scores, [one])
    return set(token_ids[0][scores[0] > float("-inf")].tolist())


def test_greedy_is_the_argmax_whatever_else_is_set(sample: Sample) -> None:
    logits = logits_of(0, rows=4)
    rows = [
        row(temperature=0.0),
        row(temperature=0.0, top_k=3),
        row(temperature=0.0, top_p=0.1),
        row(temperature=0),
    ]
    assert [s.token_id for s in sample(logits.clone(), rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-39, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_is_greedy(sample: Sample, temperature: float, top_p: float) -> None:
    logits = logits_of(1, rows=5)
    rows = [row(temperature=temperature, top_p=top_p, seed=seed) for seed in range(5)]
    assert [s.token_id for s in sample(logits.clone(), rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("spread", [0.3, 3.0])  # flat, so that top-p exceeds the first candidates; and peaked
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_filters_keep_what_transformers_keeps(temperature: float, spread: float) -> None:
    logits = logits_of(2, spread=spread)[0]
    sizes = set()
    for top_k, top_p, min_p in itertools.product((0, 1, 40, 300, 2000), (1.0, 0.95, 0.5, 0.01), (0.0, 0.05, 0.9)):
        one = row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ours, theirs = kept(logits, one), kept_by_transformers(logits, one)
        # A token exactly at top-p's border may go either way: the two implementations sum in different orders.
        assert len(ours ^ theirs) <= (top_p == 0.95), (top_k, top_p, min_p)
        assert int(logits.argmax()) in ours
        sizes.add(len(ours))
    assert len(sizes) > 4


@settings(deadline=None, max_examples=num_examples(50))
@example(seed=0, top_k=0, top_p=1 - 2**-53, min_p=0.0, temperature=0.5)
@example(seed=0, top_k=0, top_p=1 - 2**-24, min_p=0.0, temperature=0.5)
@given(
    st.integers(0, 10**6),
    st.integers(0, 600),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    st.floats(0.05, 5.0),
)
def test_filters_keep_what_transformers_keeps_at_random(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = logits_of(seed, vocab=500)[0]
    one = row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    differing = kept(logits, one) ^ kept_by_transformers(logits, one)
    if 0.999 < top_p < 1:  # several tokens at the end may have less mass than rounding errors
        probabilities = (logits.double() / temperature).softmax(-1)
        assert len(differing) <= 1 or float(probabilities[sorted(differing)].sum()) < 2**-20
    else:
        assert len(differing) <= 1


def test_filters_always_keep_the_likeliest_token() -> None:
    logits = logits_of(3)[0]
    for one in (row(top_p=1e-9), row(min_p=1.0), row(top_k=1), row(top_p=1e-9, min_p=1.0, top_k=1)):
        assert kept(logits, one) == {int(logits.argmax())}


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_matches_transformers(sample: Sample, penalty: float) -> None:
    rng = random.Random(0)
    logits = logits_of(4, rows=6, spread=1.0)
    histories = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 5, 300, 1500)] + [
        [int(logits[5].argmax())] * 3
    ]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        int(processor(torch.tensor([history]), one[None].clone())[0].argmax())
        for history, one in zip(histories, logits, strict=True)
    ]
    rows = [row(temperature=0.0, repetition_penalty=penalty, token_ids=history) for history in histories]
    assert [s.token_id for s in sample(logits.clone(), rows)] == expected
    assert penalty < 3 or expected != logits.argmax(-1).tolist(), "the penalty should change something"


def test_logprobs_are_those_before_temperature_and_penalty(sample: Sample) -> None:
    logits = logits_of(5, rows=3)
    top = [int(one.argmax()) for one in logits]
    rows = [
        row(temperature=0.0, logprobs=1),
        row(temperature=2.0, repetition_penalty=5.0, token_ids=[top[1]], logprobs=5, seed=3),
        row(temperature=0.5, top_k=2, logprobs=20),
    ]
    expected = logits.double().log_softmax(-1)
    for i, found in enumerate(sample(logits.clone(), rows)):
        assert found.logprobs is not None
        assert found.logprobs.chosen == pytest.approx(float(expected[i, found.token_id or 0]), abs=1e-5)
        best = expected[i].topk(rows[i].params.logprobs)
        assert [token for token, _ in found.logprobs.top] == best.indices.tolist()
        assert [value for _, value in found.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sample(logits.clone(), [row(), row(), row()])[0].logprobs is None


def test_more_logprobs_than_tokens(sample: Sample) -> None:
    (found,) = sample(logits_of(6, vocab=4), [row(logprobs=20)])
    assert found.logprobs is not None
    assert len(found.logprobs.top) == 4


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_p": 0.1, "repetition_penalty": 1.3}]
)
def test_nan_and_infinite_logits_give_no_token(sample: Sample, what: float, how: dict[str, Any]) -> None:
    logits = logits_of(8, rows=4)
    logits[0], logits[2, 77] = what, what
    rows = [row(logprobs=2, **how), row(logprobs=2), row(logprobs=2, **how), row(temperature=0.0)]
    found = sample(logits.clone(), rows)
    assert [found[i].token_id for i in (0, 2)] == [None, None]
    assert [found[i].logprobs for i in (0, 2)] == [None, None]
    for i in (1, 3):
        assert found[i] == sample(logits[i : i + 1].clone(), rows[i : i + 1])[0]
        assert found[i].token_id is not None


def test_filters_do_not_change_the_noise(sample: Sample) -> None:
    """A filter that drops nothing leaves the same draws, though it computes them another way."""
    logits = logits_of(7, spread=1.0).expand(300, -1)
    plain = sample(logits.clone(), [row(seed=seed) for seed in range(300)])
    filtered = sample(logits.clone(), [row(seed=seed, top_k=VOCAB, top_p=0.9999999) for seed in range(300)])
    assert [s.token_id for s in plain] == [s.token_id for s in filtered]
