"""Paired differences of two methods, their intervals, and verdicts that were fixed beforehand.

A method is compared with full fine-tuning by example and seed. Intervals come from a two-way bootstrap, which
draws seeds and examples (Owen 2007, doi:10.1214/07-AOAS122). Verdicts on several comparisons are corrected by
Holm's method (1979, Scandinavian Journal of Statistics 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

DRAWS = 10_000
CHUNK = 500
LEVEL = 0.025
"""The probability of a wrong verdict on one side, over all comparisons."""

Verdict = Literal["no worse", "worse", "can't tell"]


@dataclass(frozen=True)
class Difference:
    """A mean difference from full fine-tuning: positive is worse. `low` and `high` bound its 95 % interval."""

    mean: float
    low: float
    high: float
    margin: float  # a difference that doesn't matter
    p_above_margin: float  # of the hypothesis that the difference is the margin or more
    p_below_zero: float  # of the hypothesis that it is 0 or less


def difference(worse_by: torch.Tensor, counts: torch.Tensor, margin: float, draws: int = DRAWS) -> Difference:
    """Compare by `worse_by` (seeds, examples), sums over an example's `counts` tokens. The mean is per token."""
    num_seeds, num_examples = worse_by.shape
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(draws // CHUNK):
        examples = _drawn(num_examples, generator)  # (chunk, examples), how often each was drawn
        seeds = _drawn(num_seeds, generator)
        sums = ((examples @ worse_by.T) * seeds).sum(1) / num_seeds
        means.append(sums / (examples @ counts))
    found = torch.cat(means)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return Difference(
        float(worse_by.sum() / num_seeds / counts.sum()),
        low,
        high,
        margin,
        (1 + int((found >= margin).sum())) / (1 + len(found)),
        (1 + int((found <= 0).sum())) / (1 + len(found)),
    )


def verdicts(differences: Sequence[Difference]) -> list[Verdict]:
    """Judge all comparisons of one measure. A difference that is real, but below the margin, is no worse."""
    no_worse = _rejected([one.p_above_margin for one in differences])
    worse = _rejected([one.p_below_zero for one in differences])
    return [
        "no worse" if within else "worse" if is_worse else "can't tell"
        for within, is_worse in zip(no_worse, worse, strict=True)
    ]


def _drawn(number: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `number` of as many, with replacement, in each row: how often each was drawn."""
    drawn = torch.randint(number, (CHUNK, number), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros(CHUNK, number, dtype=torch.float64).scatter_add_(1, drawn, ones)


def _rejected(p_values: Sequence[float]) -> list[bool]:
    """Return which hypotheses Holm's method rejects."""
    rejected = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] > LEVEL / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected
