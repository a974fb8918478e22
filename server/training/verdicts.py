"""Verdicts on two sets of weights that were measured on the same rows: better, worse, or can't tell.

Differences are paired by row, and equal rows count once. A verdict is better or worse only if the 95 % interval of
the difference excludes 0. Fewer than `MIN_HELD_OUT` held-out rows are too few. Then a verdict is by exact match on
all rows of the job, trained ones included.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from server.training.encoding import MAX_REFERENCES, Reference
from server.training.evaluate import Evaluation, Scores
from server.training.job_data import JobData
from server.training.spec import Metric

Verdict = Literal["better", "worse", "can't tell"]

MIN_HELD_OUT = 20
"""The fewest distinct held-out rows that a verdict, early stopping and the choice of the best step may use."""
_Z = 1.959964
"""The normal distribution's quantile for a two-sided interval of 95 %."""
_WORDS = {"better": "better than", "worse": "worse than", "can't tell": "neither clearly better nor worse than"}


@dataclass(frozen=True)
class Comparison:
    """Two sets of weights in one metric: both values and, if known, the 95 % interval of their difference."""

    metric: Metric
    num_rows: int  # distinct rows
    includes_trained: bool  # whether rows that were trained on are among them
    tuned: float
    other: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def difference(self) -> float:
        return self.tuned - self.other

    @property
    def verdict(self) -> Verdict:
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "can't tell"
        return "better" if (self.difference < 0) == (self.metric == "loss") else "worse"

    @property
    def is_gain(self) -> bool:
        """Whether `tuned` is better by more than one standard error."""
        return self._gain > (math.inf if self.standard_error is None else self.standard_error)

    @property
    def is_loss(self) -> bool:
        """Whether `tuned` is worse by more than one standard error."""
        return -self._gain > (math.inf if self.standard_error is None else self.standard_error)

    @property
    def _gain(self) -> float:
        return -self.difference if self.metric == "loss" else self.difference

    def sentence(self, other: str) -> str:
        """Return the verdict in words, with its numbers. `other` names what `tuned` was compared with."""
        if self.metric == "loss":
            numbers = f"loss {self.tuned:.4f} against {self.other:.4f} on {self.num_rows} held-out rows"
        else:
            tuned, others = (round(share * self.num_rows) for share in (self.tuned, self.other))
            kind = "rows, trained ones included," if self.includes_trained else "held-out rows"
            numbers = f"{tuned} of {self.num_rows} {kind} exactly right, against {others}"
        if self.low is None or self.high is None:
            interval = f"a verdict takes {MIN_HELD_OUT} held-out rows, or rows with completions"
        else:
            interval = f"difference {self.difference:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        return f"{_WORDS[self.verdict]} {other}: {numbers} ({interval})"

    def document(self, version: str | None, other: str) -> dict[str, object]:
        """Return the report's entry. `other` is the name of what `tuned` was compared with.

        `version` is the compared version, or None for the base.
        """
        return {
            "version": version,
            **vars(self),
            "difference": self.difference,
            "verdict": self.verdict,
            "summary": self.sentence(other),
        }


def compare(tuned: Scores, other: Scores, data: JobData, metric: Metric) -> Comparison | None:
    """Compare two measurements of the job's rows. Return None if nothing was measured that can be compared."""
    if tuned.held_out is not None and other.held_out is not None:
        found = compare_held_out(tuned.held_out, other.held_out, data, metric)
        if found is not None:
            return found
    pairs = _pairs(data, tuned, other)
    if pairs:
        return _of_matches(pairs, includes_trained=bool(tuned.recalled))
    if tuned.held_out is None or other.held_out is None:
        return None
    rows, losses = tuned.held_out.rows, (tuned.held_out.loss, other.held_out.loss)
    return Comparison("loss", len(rows), False, *losses)


def compare_held_out(tuned: Evaluation, other: Evaluation, data: JobData, metric: Metric) -> Comparison | None:
    """Compare two evaluations. Return None if they have fewer than `MIN_HELD_OUT` rows for the metric."""
    if metric == "loss":
        return None if len(tuned.rows) < MIN_HELD_OUT else _of_losses(tuned, other)
    pairs = _pairs(data, Scores(tuned), Scores(other))
    return None if len(pairs) < MIN_HELD_OUT else _of_matches(pairs, includes_trained=False)


def _of_losses(tuned: Evaluation, other: Evaluation) -> Comparison:
    """Compare losses per token, by the standard error of a ratio estimator over rows (Cochran 1977, section 6.4).

    The difference is Σd / Σt, for each row's difference d of summed losses and its number t of tokens. Student's t
    is approximated by the first terms of its expansion in 1/(n - 1), which is exact to 0.001 from 19 degrees
    of freedom on.
    """
    differences = [first - second for (first, _), (second, _) in zip(tuned.rows, other.rows, strict=True)]
    counts = [count for _, count in tuned.rows]
    num_rows, total = len(counts), sum(counts)
    ratio = math.fsum(differences) / total
    squares = math.fsum((d - ratio * t) ** 2 for d, t in zip(differences, counts, strict=True))
    error = math.sqrt(squares * num_rows / (num_rows - 1)) / total
    degrees = num_rows - 1
    t95 = _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)
    low, high = ratio - t95 * error, ratio + t95 * error
    return Comparison("loss", num_rows, False, tuned.loss, other.loss, error, low, high)


def _of_matches(pairs: list[tuple[bool, bool]], *, includes_trained: bool) -> Comparison:
    """Compare shares of exact matches, by the exact interval that belongs to McNemar's exact test.

    Only the m rows that one of the two has right, and the other hasn't, say which is better. Clopper and Pearson's
    interval (1934) for the share p of gains among them becomes one for the difference, (2p - 1) · m / n. It takes
    at least 6 gains without a loss to exclude 0.
    """
    num_rows = len(pairs)
    gained = sum(tuned and not other for tuned, other in pairs)
    differing = gained + sum(other and not tuned for tuned, other in pairs)
    low = _least_share(gained, differing)
    high = 1 - _least_share(differing - gained, differing)
    low, high = ((2 * share - 1) * differing / num_rows for share in (low, high))
    shares = (sum(tuned for tuned, _ in pairs) / num_rows, sum(other for _, other in pairs) / num_rows)
    error = math.sqrt(differing) / num_rows  # if gains and losses are equally likely
    return Comparison("exact_match", num_rows, includes_trained, *shares, error, low, high)


def _least_share(gained: int, differing: int) -> float:
    """Return the least p at which a binomial variable reaches `gained` with a probability of at least 2.5 %."""
    low, high = 0.0, 1.0
    for _ in range(50 if gained else 0):
        p = (low + high) / 2
        tail = math.fsum(
            math.comb(differing, k) * p**k * (1 - p) ** (differing - k) for k in range(gained, differing + 1)
        )
        low, high = (low, p) if tail > 0.025 else (p, high)
    return low


def _pairs(data: JobData, tuned: Scores, other: Scores) -> list[tuple[bool, bool]]:
    """Return for up to `MAX_REFERENCES` distinct rows whether (`tuned`, `other`) completed the row exactly."""
    first, second = _matches(data, tuned), _matches(data, other)
    return [(first[row], second[row]) for row in islice(first, MAX_REFERENCES) if row in second]


def _matches(data: JobData, scores: Scores) -> dict[Reference, bool]:
    """Return whether each measured row was completed exactly, held-out rows first."""
    held_out = None if scores.held_out is None else scores.held_out.matches
    found = dict(zip(data.references, held_out, strict=True)) if held_out is not None else {}
    if scores.recalled is not None:
        found |= dict(zip(data.trained_references, scores.recalled, strict=True))
    return found
