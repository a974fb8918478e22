"""The noise against the Gumbel distribution, and draws against the softmax.

All seeds are fixed: a statistic that passes here passes always. Bounds are those of p = 0.001 or smaller.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from server.engine.sampling import gumbel
from tests.server.engine.sampling.rows import kept_by_transformers, row
from tests.server.engine.sampling.samplers import Sample


def test_noise_depends_on_seed_choice_and_position_only() -> None:
    tokens = torch.arange(500)[None]
    same = [row(seed=7, index=1, position=3), row(seed=7, index=1, position=3, token_ids=[4, 5], temperature=0.1)]
    first, second = gumbel(same, tokens)
    assert torch.equal(first, second)
    different = [row(seed=s, index=i, position=p) for s in (0, 1, 2**40) for i in (0, 1) for p in (1, 2)]
    noise = gumbel(different, tokens)
    for one, other in itertools.combinations(noise, 2):
        assert (one == other).sum() < 5


def test_the_largest_seed() -> None:
    for seed in (0, 2**63 - 1, 2**64 - 1):
        assert gumbel([row(seed=seed)], torch.arange(10)[None]).isfinite().all()


def largest_gap(noise: torch.Tensor) -> float:
    """Return the Kolmogorov–Smirnov statistic: the largest distance to the standard Gumbel distribution, times
    √n."""
    values = noise.flatten().double().sort().values
    n = values.shape[0]
    expected = (-(-values).exp()).exp()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    return gap * math.sqrt(n)


@pytest.mark.parametrize("kind", ["tokens", "seeds", "positions", "choices"])
def test_the_noise_is_standard_gumbel(kind: str) -> None:
    if kind == "tokens":
        noise = gumbel([row(seed=3)], torch.arange(200_000)[None])
    else:
        name = {"seeds": "seed", "positions": "position", "choices": "index"}[kind]
        streams: list[dict[str, Any]] = [{name: value} for value in range(20_000)]
        noise = gumbel([row(**stream) for stream in streams], torch.tensor([[42]]))
    assert largest_gap(noise) < 1.95
    euler = 0.5772156649
    n = noise.numel()
    assert abs(float(noise.double().mean()) - euler) < 4 * math.pi / 6**0.5 / n**0.5
    assert noise.isfinite().all()


def test_neighbours_are_uncorrelated() -> None:
    grid = {
        "position": gumbel([row(position=p) for p in range(1000)], torch.arange(200)[None]),
        "seed": gumbel([row(seed=s) for s in range(1000)], torch.arange(200)[None]),
        "index": gumbel([row(index=i) for i in range(1000)], torch.arange(200)[None]),
    }
    for name, noise in grid.items():
        # Ranks' uniform: heavy tails would hide a dependence.
        uniform = (-(-noise.double()).exp()).exp() - 0.5
        for shifted, rest in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])):
            for one, other in ((shifted, rest), (shifted.square() - 1 / 12, rest.square() - 1 / 12)):
                correlation = float((one * other).mean() / (one.square().mean() * other.square().mean()).sqrt())
                assert abs(correlation) < 4 / one.numel() ** 0.5, name


def test_every_bit_of_the_uniform_is_fair() -> None:
    noise = gumbel([row(seed=9, position=p) for p in range(50)], torch.arange(4000)[None]).double()
    uniform = (-(-noise).exp()).exp()
    for bits in (1, 2, 4, 8):
        counts = torch.bincount((uniform * 2**bits).long().flatten().clamp(max=2**bits - 1), minlength=2**bits)
        expected = noise.numel() / 2**bits
        chi = float(((counts - expected) ** 2 / expected).sum())
        freedom = 2**bits - 1
        assert chi < freedom + 4 * (2 * freedom) ** 0.5 + 8


def chi_square(tokens: Sequence[int | None], probabilities: torch.Tensor) -> float:
    counts = Counter(tokens)
    assert all(token is not None and probabilities[token] > 0 for token in counts), "a token that can't be"
    shares: list[float] = probabilities.tolist()
    return sum(
        (counts[token] - len(tokens) * p) ** 2 / (len(tokens) * p) for token, p in enumerate(shares) if p > 0
    )


@pytest.mark.parametrize("over", ["seed", "position", "index"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "min_p": 0.2},
        {"top_k": 3},
        {"top_p": 0.7, "temperature": 1.5},
    ],
    ids=str,
)
def test_draws_follow_the_softmax(sample: Sample, params: dict[str, Any], over: str) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.7, 0.2])
    base = row(seed=11, **params)
    allowed = kept_by_transformers(logits, base)
    masked = torch.full_like(logits, float("-inf"))
    masked[list(allowed)] = logits[list(allowed)]
    probabilities = (masked.double() / base.params.temperature).softmax(-1)
    num = 20_000
    changes: list[dict[str, Any]] = [{"seed": 11, over: value} for value in range(num)]
    rows = [row(**change, **params) for change in changes]
    tokens = [s.token_id for s in sample(logits.repeat(num, 1), rows)]
    freedom = len(allowed) - 1
    assert chi_square(tokens, probabilities) < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


def test_a_rare_token_is_drawn_at_its_probability(sample: Sample) -> None:
    logits = torch.zeros(1001)
    rows = [row(seed=seed) for seed in range(20_000)]
    counts = Counter(s.token_id for s in sample(logits.repeat(20_000, 1), rows))
    chi = sum((counts[token] - 20_000 / 1001) ** 2 / (20_000 / 1001) for token in range(1001))
    assert abs(chi - 1000) < 4 * 2000**0.5
