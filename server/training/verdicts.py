"""Verdicts on two sets of weights that were measured on the same rows: better, worse, or can't tell.

Differences are paired by row, and equal rows count once. A verdict is better or worse only if the 95 % interval of
the difference excludes 0. Fewer than `MIN_HELD_OUT` held-out rows are too few. Then a verdict is by exact match on
all rows of the job, trained ones included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Literal

from server.decisions.quality import difference_interval
from server.training.decisions import QuestionScores, row_measures
from server.training.encoding import MAX_REFERENCES, Reference
from server.training.evaluate import Evaluation, Scores
from server.training.job_data import JobData
from server.training.spec import DECISION_METRICS, LOWER_IS_BETTER, Metric

Verdict = Literal["better", "worse", "can't tell"]

MIN_HELD_OUT = 20
"""The fewest distinct held-out rows that a verdict, early stopping and the choice of the best step may use."""
_Z = 1.959964
"""The normal distribution's quantile for a two-sided interval of 95 %."""
_MEANS = {"loss": "loss", "brier": "Brier score"}
Fitted = tuple[Mapping[str, QuestionScores], Mapping[str, QuestionScores]]
"""The held-out decisions of both weights by question, to which the temperatures of test rows are fitted."""
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
        return "better" if self._gain > 0 else "worse"

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
        return -self.difference if self.metric in LOWER_IS_BETTER else self.difference

    def sentence(self, other: str, rows: str = "held-out") -> str:
        """Return the verdict in words, with its numbers.

        `other` names what `tuned` was compared with, and `rows` is the kind of the rows, if none was trained on.
        """
        if self.metric in _MEANS:
            values = f"{_MEANS[self.metric]} {self.tuned:.4f} against {self.other:.4f}"
            numbers = f"{values} on {self.num_rows} {rows} rows"
        else:
            tuned, others = (round(share * self.num_rows) for share in (self.tuned, self.other))
            kind = "rows, trained ones included," if self.includes_trained else f"{rows} rows"
            right = "exactly right" if self.metric == "exact_match" else "decided right"
            numbers = f"{tuned} of {self.num_rows} {kind} {right}, against {others}"
        if self.low is None or self.high is None:
            interval = f"a verdict takes {MIN_HELD_OUT} {rows} rows, or rows with completions"
        else:
            interval = f"difference {self.difference:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        return f"{_WORDS[self.verdict]} {other}: {numbers} ({interval})"

    def document(self, version: str | None, other: str, rows: str = "held-out") -> dict[str, object]:
        """Return the report's entry. `other` and `rows` are as in `sentence`.

        `version` is the compared version, or None for the base.
        """
        return {
            "version": version,
            **vars(self),
            "difference": self.difference,
            "verdict": self.verdict,
            "summary": self.sentence(other, rows),
        }


def compare(
    tuned: Scores, other: Scores, data: JobData, metric: Metric, fitted: Fitted | None = None
) -> Comparison | None:
    """Compare two measurements of the job's rows. Return None if nothing was measured that can be compared.

    If the rows are test rows, `fitted` has both weights' held-out decisions.
    """
    if tuned.held_out is not None and other.held_out is not None:
        found = compare_held_out(tuned.held_out, other.held_out, data, metric, fitted)
        if found is not None:
            return found
    pairs = _pairs(data, tuned, other)
    if pairs:
        return _of_matches(pairs, includes_trained=bool(tuned.recalled))
    if tuned.held_out is None or other.held_out is None:
        return None
    rows, losses = tuned.held_out.rows, (tuned.held_out.loss, other.held_out.loss)
    return Comparison("loss", len(rows), False, *losses)


def compare_held_out(
    tuned: Evaluation, other: Evaluation, data: JobData, metric: Metric, fitted: Fitted | None = None
) -> Comparison | None:
    """Compare two evaluations. Return None if they have fewer than `MIN_HELD_OUT` rows for the metric."""
    if metric == "loss":
        differences = [first - second for (first, _), (second, _) in zip(tuned.rows, other.rows, strict=True)]
        counts = [count for _, count in tuned.rows]
        return (
            None if len(counts) < MIN_HELD_OUT else _of_means(metric, differences, counts, tuned.loss, other.loss)
        )
    if metric in DECISION_METRICS:
        return _of_decisions(tuned, other, data, metric, fitted)
    pairs = _pairs(data, Scores(tuned), Scores(other))
    return None if len(pairs) < MIN_HELD_OUT else _of_matches(pairs, includes_trained=False)


def _of_decisions(
    tuned: Evaluation, other: Evaluation, data: JobData, metric: Metric, fitted: Fitted | None
) -> Comparison | None:
    """Compare decisions, with temperatures of `fitted`, or by cross-fitting, on both sides."""
    of_tuned, of_other = fitted or (None, None)
    (are_right, scores), (others_right, others) = (
        row_measures(data, tuned, of_tuned),
        row_measures(data, other, of_other),
    )
    if min(len(scores), len(others)) < MIN_HELD_OUT:
        return None
    if metric == "accuracy":
        pairs = list(zip(are_right, others_right, strict=True))
        return _of_matches(pairs, includes_trained=False, metric="accuracy")
    differences = [first - second for first, second in zip(scores, others, strict=True)]
    return _of_means(metric, differences, [1] * len(scores), fmean(scores), fmean(others))


def _of_means(
    metric: Metric, differences: Sequence[float], counts: Sequence[int], tuned: float, other: float
) -> Comparison:
    """Compare losses per token, by the standard error of a ratio estimator over rows (Cochran 1977, section 6.4).

    The difference is Σd / Σt, for each row's difference d of summed losses and its number t of tokens. With t = 1,
    it is a mean over rows, and the interval is that of the paired t-test. Student's t is approximated by the first
    terms of its expansion in 1/(n - 1), which is exact to 0.001 from 19 degrees of freedom on.
    """
    num_rows, total = len(counts), sum(counts)
    ratio = math.fsum(differences) / total
    squares = math.fsum((d - ratio * t) ** 2 for d, t in zip(differences, counts, strict=True))
    error = math.sqrt(squares * num_rows / (num_rows - 1)) / total
    degrees = num_rows - 1
    t95 = _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)
    low, high = ratio - t95 * error, ratio + t95 * error
    return Comparison(metric, num_rows, False, tuned, other, error, low, high)


def _of_matches(
    pairs: Sequence[tuple[bool, bool]], *, includes_trained: bool, metric: Metric = "exact_match"
) -> Comparison:
    """Compare shares of right answers. It takes at least 6 gains without a loss to be better."""
    num_rows = len(pairs)
    gained = sum(tuned and not other for tuned, other in pairs)
    lost = sum(other and not tuned for tuned, other in pairs)
    low, high = difference_interval(gained, lost, num_rows)
    shares = (sum(tuned for tuned, _ in pairs) / num_rows, sum(other for _, other in pairs) / num_rows)
    error = math.sqrt(gained + lost) / num_rows  # if gains and losses are equally likely
    return Comparison(metric, num_rows, includes_trained, *shares, error, low, high)


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
