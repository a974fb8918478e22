"""What a run gives, whoever ran it, and the few statistics that are made of it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise


@dataclass(frozen=True)
class Run:
    """Some answers that were generated together. Times are in seconds."""

    num_tokens: int  # generated, all answers together
    seconds: float  # from the first request to the last token
    first_token: tuple[float, ...]  # of each answer: from its request to its first token
    gaps: tuple[float, ...]  # between the tokens of an answer, of all answers
    texts: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Figures:
    """The figures of one run that are reported. Times are in seconds."""

    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float

    @classmethod
    def of(cls, run: Run) -> "Figures":
        return cls(
            run.num_tokens / run.seconds,
            percentile(run.first_token, 50),
            percentile(run.first_token, 99),
            percentile(run.gaps, 50),
            percentile(run.gaps, 99),
        )


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """ValueError where there are none."""
        return cls(percentile(values, 50), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly; NaN of nothing."""
    if not values:
        return math.nan
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread | None:
    """Of each round's ratio, so that a machine that drifts between rounds doesn't show; None without pairs."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=False)]
    return Spread.of(ratios) if ratios else None


def differences(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def join(runs: Sequence[Run]) -> Run:
    """Runs that followed each other, as one."""
    return Run(
        sum(run.num_tokens for run in runs),
        sum(run.seconds for run in runs),
        _chain(run.first_token for run in runs),
        _chain(run.gaps for run in runs),
        tuple(chain.from_iterable(run.texts for run in runs)),
    )


def _chain(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(parts))
