"""The native sampler compared with torch's: equal tokens except for rounding, and log-probabilities.

Other tests here check what both must do. A row's result has the same bits for any number of threads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import sampling
from server.engine.native_backend import sample_natively
from server.engine.sampling import LogitsRow, Sampled, constrain, penalize
from server.engine.sequence import TokenCounts
from server.model.native.sampling import SampleTable
from tests.kits.properties import num_examples
from tests.server.engine.sampling.exact_sampler import exact_noise, may_be_chosen
from tests.server.engine.sampling.rows import row
from tests.server.engine.sampling.samplers import Sample, any_model, native_sample

VOCABS = (32, 64, 992, 4096)
INF = float("inf")


@pytest.fixture(scope="module")
def native() -> Sample:
    return native_sample(num_threads=2)


def logits_like(kind: str, seed: int, vocab: int) -> torch.Tensor:
    """Return fp32 logits (vocab,)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocab, generator=generator)
    if kind == "a model's":
        return noise * 2.5 + 5
    if kind == "peaked":
        return noise * 8 - 3
    if kind == "flat":
        return noise * 0.1
    if kind == "coarse":
        return (noise * 16).round() / 8
    if kind == "equal":
        return torch.full((vocab,), float(noise[0]))
    if kind == "large":
        return noise * 1e4
    if kind == "half forbidden":
        return noise.masked_fill(torch.rand(vocab, generator=generator) < 0.5, -INF)
    if kind == "one left":
        return torch.full((vocab,), -INF).index_fill_(0, torch.tensor([seed % vocab]), 1.0)
    if kind == "none left":
        return torch.full((vocab,), -INF)
    noise[seed % vocab] = {"infinite": INF, "no number": float("nan")}[kind]
    return noise


KINDS = (
    *("a model's", "a model's", "peaked", "flat", "coarse", "equal", "large"),
    *("half forbidden", "one left", "none left", "infinite", "no number"),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[LogitsRow]]:
    """Generate logits (rows, vocab), and sampling parameters for each row."""
    vocab = draw(st.sampled_from(VOCABS))
    some = st.lists(st.integers(0, vocab - 1), max_size=40)
    logits, rows = [], []
    for _ in range(draw(st.integers(1, 5))):
        logits.append(logits_like(draw(st.sampled_from(KINDS)), draw(st.integers(0, 10**6)), vocab))
        history = draw(some)
        biases = dict(zip(draw(some), (-100.0, 3.0, -0.5, 20.0), strict=False))
        one = row(
            index=draw(st.integers(0, 3)),
            position=draw(st.integers(0, 9000)),
            seed=draw(st.integers(0, 2**64 - 1)),
            token_ids=history,
            temperature=draw(st.sampled_from([0.0, 1e-9, 0.05, 0.7, 0.7, 1.0, 1.5, 5.0])),
            top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 40, 500, 2**31])),
            top_p=draw(st.one_of(st.just(1.0), st.just(0.9), st.floats(1e-9, 1.0))),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.5, 1.0])),
            logprobs=draw(st.sampled_from([0, 0, 1, 5, 20])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.1])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.3])),
            logit_bias=tuple(biases.items()) if draw(st.booleans()) else (),
        )
        one = one._replace(counts=TokenCounts(history, len(history) // 2))
        if draw(st.integers(0, 3)) == 0:
            generator = np.random.default_rng(draw(st.integers(0, 100)))
            mask = generator.random(vocab) < draw(st.sampled_from([0.1, 0.9, 0.999]))
            mask_or_failed = draw(st.sampled_from([mask, mask, mask, None]))
            one = one._replace(forbidden=partial(lambda found: found, mask_or_failed))
        rows.append(one)
    return torch.stack(logits), rows


def changed(logits: torch.Tensor, rows: Sequence[LogitsRow]) -> torch.Tensor:
    logits = logits.clone()
    penalize(logits, rows)
    constrain(logits, rows)
    return logits


def likeliest(logits: torch.Tensor, num: int) -> list[int]:
    """Return the ids of the `num` likeliest tokens, equals ordered by id. Sorting all would dominate the tests'
    time."""
    candidates = (logits >= logits.topk(num).values[-1]).nonzero()[:, 0]
    order = logits[candidates].sort(descending=True, stable=True).indices
    return candidates[order][:num].tolist()


def check_logprobs(found: Sampled, logits: torch.Tensor, one: LogitsRow) -> None:
    """Check log-probabilities of the unchanged logits."""
    if found.token_id is None or not one.params.logprobs:
        assert found.logprobs is None
        return
    assert found.logprobs is not None
    if not logits.isfinite().any() or logits.isnan().any() or logits.max() == INF:
        return  # a constraint has left a value, but no probabilities
    expected = logits.double().log_softmax(-1)
    off = 1e-5 + 2.0**-22 * float(expected[expected.isfinite()].abs().max())
    assert found.logprobs.chosen == pytest.approx(float(expected[found.token_id]), abs=off)
    num_finite = int(logits.isfinite().sum())
    best = likeliest(logits, min(one.params.logprobs, num_finite))
    assert [token_id for token_id, _ in found.logprobs.top] == best
    assert [value for _, value in found.logprobs.top] == pytest.approx(expected[best].tolist(), abs=off)


@settings(deadline=None, max_examples=num_examples(1000))
@given(batches())
def test_native_tokens_equal_torchs(native: Sample, batch: tuple[torch.Tensor, list[LogitsRow]]) -> None:
    logits, rows = batch
    ours, overwritten = logits.clone(), changed(logits, rows)
    found, theirs = native(ours, rows), sampling.sample(logits.clone(), rows)
    torch.testing.assert_close(ours, overwritten, rtol=0, atol=0, equal_nan=True)
    for i, one in enumerate(rows):
        by_ids, in_any_order = may_be_chosen(overwritten[i], one)
        assert found[i].token_id in by_ids
        assert theirs[i].token_id in in_any_order
        check_logprobs(found[i], logits[i], one)


@pytest.mark.parametrize("vocab", [4096, 49_152])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.98},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 2.0, "top_k": 1000, "top_p": 0.6},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_rounding_rarely_changes_a_token(native: Sample, params: dict[str, Any], vocab: int) -> None:
    num = 60
    logits = torch.stack([logits_like("a model's", seed, vocab) for seed in range(num)])
    rows = [row(seed=seed, logprobs=3, **params) for seed in range(num)]
    found, theirs = native(logits.clone(), rows), sampling.sample(logits.clone(), rows)
    open_ones = 0
    for i, one in enumerate(rows):
        by_ids, in_any_order = may_be_chosen(logits[i], one)
        assert found[i].token_id in by_ids
        assert theirs[i].token_id in in_any_order
        check_logprobs(found[i], logits[i], one)
        open_ones += len(by_ids) > 1
    assert open_ones <= 2
    assert len({one.token_id for one in found}) > 10


@settings(deadline=None, max_examples=num_examples(100))
@given(batches())
def test_threads_and_other_rows_change_no_bit(batch: tuple[torch.Tensor, list[LogitsRow]]) -> None:
    logits, rows = batch
    expected = native_sample(num_threads=1)(logits.clone(), rows)
    for num_threads in (2, 3, 4):
        assert repr(native_sample(num_threads)(logits.clone(), rows)) == repr(expected)
    backwards = native_sample(num_threads=3)(logits.flip(0), rows[::-1])
    assert repr(backwards[::-1]) == repr(expected)
    for i, one in enumerate(rows):
        assert repr(native_sample(num_threads=2)(logits[i : i + 1].clone(), [one])) == repr(expected[i : i + 1])


def test_ties_are_broken_by_token_id(native: Sample) -> None:
    """Of equal tokens at a filter's border, those with the lowest ids are kept, and each may be drawn."""
    logits = torch.zeros(500, 992)
    logits[:, 900] = 1.0
    for top_k, top_p in ((3, 1.0), (0, (2.718281828 + 1.5) / (991 + 2.718281828)), (3, 0.9)):
        drawn = native(logits.clone(), [row(seed=seed, top_k=top_k, top_p=top_p) for seed in range(500)])
        assert {one.token_id for one in drawn} == {900, 0, 1}
    (one,) = native(logits[:1].clone(), [row(logprobs=4)])
    assert one.logprobs is not None
    assert [token_id for token_id, _ in one.logprobs.top] == [900, 0, 1, 2]
    assert native(torch.ones(1, 64), [row(temperature=0.0)])[0].token_id == 0


def test_hidden_states_and_their_logits_give_the_same() -> None:
    model = any_model(992, 2)
    hidden = torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = [row(seed=seed, top_p=0.9, logprobs=2, temperature=0.7) for seed in range(9)]
    of_hidden = sample_natively(model, rows, hidden)
    assert sample_natively(model, rows, model.logits(hidden)) == of_hidden
    assert sample_natively(model, rows[4:5], hidden[4:5]) == of_hidden[4:5]
    assert sample_natively(model, [], hidden[:0]) == []


def test_the_exact_noise_is_torchs() -> None:
    rows = [row(seed=seed) for seed in range(20)]
    noise = sampling.gumbel(rows, torch.arange(5000)[None])
    exact = torch.tensor(np.stack([exact_noise(one, 5000) for one in rows]))
    torch.testing.assert_close(noise.double(), exact, rtol=0, atol=1e-5)


def table(**asked: Any) -> SampleTable:
    found = SampleTable(64)
    plain: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "key": 1, "num_top": 0}
    found.add(**{**plain, **asked})
    return found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seen": np.array([64])}, "token id 64 is not one of the vocabulary of 64"),
        ({"added_ids": np.array([-1]), "added": np.array([2.0])}, "token id -1"),
        ({"temperature": float("nan")}, "row 0 has the temperature nan"),
        ({"temperature": -1.0}, "row 0 has the temperature -1"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": -0.5}, "top-p -0.5"),
        ({"min_p": float("nan")}, "min-p nan"),
        ({"num_top": -1}, "row 0 wants -1 likeliest tokens of 0"),
    ],
)
def test_invalid_parameters_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        any_model(64, 1).sample(torch.zeros(1, 64), table(**asked))
    assert any_model(64, 1).sample(torch.zeros(1, 64), table()).token_ids[0] >= 0


@pytest.mark.parametrize("mask", [np.zeros(63, np.bool_), np.zeros(64, np.uint8), np.zeros((1, 64), np.bool_)])
def test_masks_of_other_sizes(mask: Any) -> None:
    with pytest.raises(ValueError, match="the mask of forbidden tokens must be 64 bools"):
        table(forbidden=mask)


def test_rows_of_other_sizes() -> None:
    model = any_model(64, 1)
    for wrong in (torch.zeros(2, 64), torch.zeros(0, 64)):
        with pytest.raises(ValueError, match="a table of 1 rows"):
            model.sample(wrong, table())
    for wrong in (torch.zeros(1, 32), torch.zeros(1, 64).double(), torch.zeros(1, 64).bfloat16()):
        with pytest.raises(ValueError, match=r"must be .*, of shape \(rows, "):
            model.sample(wrong, table())
