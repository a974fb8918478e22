"""Figures of a run of any system, and the statistics derived from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Annotated

from pydantic import BeforeValidator

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number, or NaN if it couldn't be measured: null in JSON."""


@dataclass(frozen=True)
class Run:
    """Answers generated in one run. Times are in seconds."""

    num_tokens: int  # generated, over all answers
    seconds: float  # from the first request to the last token
    first_token: tuple[float, ...]  # by answer: from its request to its first token
    gaps: tuple[float, ...]  # between consecutive tokens, over all answers
    texts: tuple[str, ...] = field(default=(), repr=False)
    num_cached_tokens: int = 0  # prompt tokens served by a prefix cache
    num_resent: int = 0  # resent requests, counting every attempt


@dataclass(frozen=True)
class Figures:
    """The reported figures of one run. Times are in seconds."""

    tokens_per_second: Figure
    ttft_p50: Figure
    ttft_p99: Figure
    itl_p50: Figure
    itl_p99: Figure
    num_resent: int = 0  # requests resent because their connection was dropped

    @classmethod
    def of(cls, run: Run) -> "Figures":
        return cls(
            run.num_tokens / run.seconds,
            percentile(run.first_token, 50),
            percentile(run.first_token, 99),
            percentile(run.gaps, 50),
            percentile(run.gaps, 99),
            run.num_resent,
        )


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of the values. Raise ValueError if there are none."""
        return cls(percentile(values, 50), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the two nearest ranks. Return NaN for no values."""
    if not values:
        return math.nan
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread | None:
    """Return the spread of the rounds' own ratios, which cancel drift between rounds, or None without pairs.

    A round without a figure has no ratio, nor has one with a denominator of 0: gaps are 0 s if tokens arrive
    together.
    """
    pairs = zip(numerators, denominators, strict=False)
    ratios = [above / below for above, below in pairs if math.isfinite(above) and math.isfinite(below) and below]
    return Spread.of(ratios) if ratios else None


def differences(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def join(runs: Sequence[Run]) -> Run:
    """Combine consecutive runs into one."""
    return Run(
        sum(run.num_tokens for run in runs),
        sum(run.seconds for run in runs),
        _chain(run.first_token for run in runs),
        _chain(run.gaps for run in runs),
        tuple(chain.from_iterable(run.texts for run in runs)),
        sum(run.num_cached_tokens for run in runs),
        sum(run.num_resent for run in runs),
    )


def _chain(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(parts))


STUDENTS_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % point of Student's t by the number of values."""


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval; NaN for a single value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean, math.nan)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return cls(mean, STUDENTS_T[len(values)] * deviation / math.sqrt(len(values)))

    def text(self, form: str) -> str:
        return form.format(self.mean) + ("" if math.isnan(self.half) else f" ± {form.format(self.half)}")


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share among `count` cases: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)
