"""A row's bits don't depend on the other rows of its batch.

Logits are coarse, so that many are equal, and top-p is at the border of a token: the order of equals and the last
bit of a sum decide which tokens are kept.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.engine.sampling import LogitsRow, _candidates
from tests.kits.properties import num_examples
from tests.server.engine.sampling.rows import row
from tests.server.engine.sampling.samplers import Sample

VOCAB = 3000
Params = dict[str, Any]


def coarse_logits(seed: int, spread: float, vocab: int = VOCAB) -> torch.Tensor:
    """Return logits (vocab,) in steps of an eighth."""
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    return (noise * spread * 8).round() / 8


def on_a_border(logits: torch.Tensor, temperature: float, place: int) -> float:
    """Return a top-p that equals the mass of the `place` likeliest tokens in float32."""
    ordered = (logits / temperature).sort(descending=True).values
    return float(ordered.softmax(-1)[:place].cumsum(-1)[-1].clamp(max=1 - 2**-20))


row_params = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "index": st.integers(0, 3),
        "position": st.integers(1, 50),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 5, 50, 255, 257, 400, 2999, 5000]),
        "border": st.sampled_from([0, 0, 1, 5, 60, 250, 256, 300, 2000]),  # of top-p, in tokens; 0: off
        "min_p": st.sampled_from([0.0, 0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "logprobs": st.integers(0, 3),
        "spread": st.sampled_from([0.3, 1.0, 3.0]),
    }
)


def rows_of(many: Sequence[Params]) -> tuple[torch.Tensor, list[LogitsRow]]:
    """Return logits (rows, vocab) and the sampling parameters of each row."""
    logits = torch.stack([coarse_logits(i, asked["spread"]) for i, asked in enumerate(many)])
    rows = []
    for one, asked in zip(logits, many, strict=True):
        params = {name: value for name, value in asked.items() if name not in ("border", "spread")}
        if asked["border"] and asked["temperature"]:
            params["top_p"] = on_a_border(one, asked["temperature"], int(asked["border"]))
        rows.append(row(token_ids=[1, 2, 3], **params))
    return logits, rows


def plain(**asked: Any) -> Params:
    return {"seed": 1, "temperature": 1.0, "top_k": 0, "border": 0, "spread": 3.0, **asked}


@settings(deadline=None, max_examples=num_examples(60))
@given(st.lists(row_params, min_size=2, max_size=10))
@example([plain(border=60), plain(top_k=400)])
@example([plain(top_k=5), plain(top_k=400)])
@example([plain(top_k=50, border=5), plain(border=2000, spread=0.3)])  # one falls back to the whole vocabulary
@example([plain(top_k=2999), plain(border=300, spread=0.3), plain(top_k=2999)])  # to where the others begin
def test_a_row_draws_the_same_in_any_batch(sample: Sample, many: list[Params]) -> None:
    logits, rows = rows_of(many)
    together = sample(logits.clone(), rows)
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards == together[::-1]
    for i, one in enumerate(rows):
        (alone,) = sample(logits[i : i + 1].clone(), [one])
        assert alone == together[i]  # includes the log-probabilities


def candidates_of(logits: torch.Tensor, rows: Sequence[LogitsRow]) -> list[dict[int, float]]:
    """Return for each row the tokens that its filters keep, in order, and their scores."""
    found: list[dict[int, float]] = [{} for _ in rows]
    for members, scores, token_ids in _candidates(logits, rows):
        for place, i in enumerate(members):
            ids = token_ids[place if len(token_ids) > 1 else 0].tolist()
            pairs = zip(ids, scores[place].tolist(), strict=True)
            found[i] = {token_id: score for token_id, score in pairs if score > float("-inf")}
    return found


@pytest.mark.parametrize("num_threads", [1, 2])
def test_filters_leave_the_same_tokens_in_any_batch(num_threads: int) -> None:
    """Many borders are tried. Alone, such a long row would be summed by all threads with torch's own sum."""
    torch.set_num_threads(num_threads)
    logits = coarse_logits(3, 2.0, vocab=40_000)
    others = torch.stack([coarse_logits(seed, 0.3, vocab=40_000) for seed in range(2)])
    flat, large = row(top_p=0.99), row(top_k=700)
    sizes = set()
    for place in range(1, 250, 6):
        one = row(top_p=on_a_border(logits, 1.0, place))
        (alone,) = candidates_of(logits[None], [one])
        for company in ([row(top_k=place), large], [large, flat][: 2 if place % 4 == 1 else 1]):
            together = candidates_of(torch.stack([logits, *others[: len(company)]]), [one, *company])[0]
            assert list(together.items()) == list(alone.items())
        sizes.add(len(alone))
    assert len(sizes) > 20


def test_only_rows_that_need_it_sort_the_whole_vocabulary() -> None:
    """Sorting everything is slow: other rows aren't sorted too."""
    logits = torch.stack([coarse_logits(1, 3.0), coarse_logits(2, 0.3), coarse_logits(3, 3.0)])
    shapes = [
        (members, scores.shape[-1])
        for members, scores, _ in _candidates(logits, [row(top_p=0.5), row(top_p=0.99), row(top_p=0.5)])
    ]
    assert shapes == [([0, 2], 256), ([1], VOCAB)]
