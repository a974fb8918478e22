"""Quality of decisions: how often the likeliest option is right, and how far probabilities can be trusted.

All figures are about one question, on rows whose right options are known. Intervals are of 95 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MAX_BINS, MIN_BINS = 15, 5
"""Confidences from 0 to 1 are divided into bins of equal width: one for each 10 rows, within these bounds."""
NUM_RESAMPLES = 1000
MAX_SHOWN = 20
"""The most options that a confusion matrix shows one by one."""
_RESAMPLES_AT_ONCE = 100

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """The decisions whose confidence is from `low` up to `high`: their mean confidence, and their accuracy."""

    low: float
    high: float
    num_rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Confusion:
    """How often each right option (row) was answered with each option (column).

    `options` has the indices of the rows and columns, in order. If options are left out, they share one more row
    and column.
    """

    options: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]


class MeasuredDecisions:
    """Answers to one question on several rows. The answer to a row is its likeliest option.

    A row's confidence is the probability of the answer, not the `confidence` of a response of /decide.
    """

    def __init__(self, probabilities: npt.ArrayLike, answers: npt.ArrayLike) -> None:
        """`probabilities` is shaped (rows, options). `answers` has the index of each row's right option."""
        self.probabilities = np.asarray(probabilities, dtype=np.float64)
        self.answers = np.asarray(answers, dtype=np.int64)
        self.num_rows, self.num_options = self.probabilities.shape
        self.chosen = self.probabilities.argmax(1)
        self.is_right = self.chosen == self.answers
        self.num_bins = min(max(self.num_rows // 10, MIN_BINS), MAX_BINS)

    @cached_property
    def brier_scores(self) -> Array:
        """The Brier score of each row, from 0 to 2: Σ (p - y)² over all options, y being 1 for the right option.

        This is the original, multiclass form (Brier 1950), for two options as well.
        """
        found: Array = ((self.probabilities - self._one_hot(self.answers)) ** 2).sum(1)
        return found

    @cached_property
    def confidences(self) -> Array:
        found: Array = self.probabilities.max(1)
        return found

    @cached_property
    def bins(self) -> npt.NDArray[np.int64]:
        """The index of the bin of each row's confidence."""
        found: npt.NDArray[np.int64] = (self.confidences * self.num_bins).astype(np.int64)
        return np.where(found < self.num_bins, found, self.num_bins - 1)

    @cached_property
    def figures(self) -> dict[str, Estimate]:
        """Accuracy, macro-F1, Brier score and expected calibration error.

        Macro-F1 is the mean over the options that occur as answers or as right options. The expected calibration
        error is the mean of |confidence - accuracy| of the bins, weighted by rows (Guo et al. 2017,
        arXiv:1706.04599). With few rows it is too high on average, since chance makes the two differ in each bin.

        The interval of accuracy is exact, by Clopper and Pearson (1934). The other intervals are a percentile
        bootstrap's, which can't account for errors that don't occur in the rows.
        """
        values = self._resampled(np.ones((1, self.num_rows)))[0]
        lows, highs = bootstrap(self.num_rows, self._resampled)
        num_right = int(self.is_right.sum())
        found = {"accuracy": Estimate(num_right / self.num_rows, *share_interval(num_right, self.num_rows))}
        for name, value, low, high in zip(
            ("macro_f1", "brier", "calibration_error"), values, lows, highs, strict=True
        ):
            # resampling adds noise to the calibration error, so that its value may be below all resamples
            found[name] = Estimate(float(value), float(min(low, value)), float(max(high, value)))
        return found

    def reliability(self) -> list[Bin]:
        """Return the bins that have rows, from the lowest confidence to the highest."""
        found = []
        for number in np.unique(self.bins):
            rows = self.bins == number
            low, high = float(number) / self.num_bins, float(number + 1) / self.num_bins
            confidence, accuracy = float(self.confidences[rows].mean()), float(self.is_right[rows].mean())
            found.append(Bin(low, high, int(rows.sum()), confidence, accuracy))
        return found

    def confusion(self) -> Confusion:
        """Return the confusion matrix. Beyond `MAX_SHOWN` options, it shows those that are right most often."""
        counts = np.zeros((self.num_options, self.num_options), dtype=np.int64)
        np.add.at(counts, (self.answers, self.chosen), 1)
        if self.num_options <= MAX_SHOWN:
            return _confusion(range(self.num_options), counts)
        by_frequency = np.argsort(-counts.sum(1), kind="stable")
        shown, others = np.sort(by_frequency[:MAX_SHOWN]), by_frequency[MAX_SHOWN:]
        merged = np.zeros((MAX_SHOWN + 1, MAX_SHOWN + 1), dtype=np.int64)
        merged[:-1, :-1] = counts[np.ix_(shown, shown)]
        merged[:-1, -1] = counts[np.ix_(shown, others)].sum(1)
        merged[-1, :-1] = counts[np.ix_(others, shown)].sum(0)
        merged[-1, -1] = counts[np.ix_(others, others)].sum()
        return _confusion(shown.tolist(), merged)

    def _resampled(self, counts: Array) -> Array:
        """Return (macro-F1, Brier score, calibration error) of each resample, as `bootstrap` wants them."""
        chosen, right = self._one_hot(self.chosen), self._one_hot(self.answers)
        num_hits, num_occurrences = counts @ (chosen * right), counts @ (chosen + right)  # (resamples, options)
        f1 = 2 * num_hits / np.maximum(num_occurrences, 1)
        gaps = np.zeros((self.num_rows, self.num_bins))
        gaps[np.arange(self.num_rows), self.bins] = self.confidences - self.is_right
        return np.stack(
            [
                f1.sum(1) / (num_occurrences > 0).sum(1),
                counts @ self.brier_scores / self.num_rows,
                np.abs(counts @ gaps).sum(1) / self.num_rows,
            ],
            axis=1,
        )

    def _one_hot(self, options: npt.NDArray[np.int64]) -> Array:
        return np.eye(self.num_options)[options]


def bootstrap(num_rows: int, figures: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return the lower and the upper ends of figures' 95 % intervals: a percentile bootstrap over rows.

    `figures` gets how often each row is drawn, shaped (resamples, rows). It returns the figures of each resample,
    shaped (resamples, figures). The seed is fixed, so equal rows have equal intervals.
    """
    rng = np.random.default_rng(0)
    starts = np.arange(_RESAMPLES_AT_ONCE)[:, None] * num_rows
    found = []
    for _ in range(NUM_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn = rng.integers(num_rows, size=(_RESAMPLES_AT_ONCE, num_rows))
        counts = np.bincount((starts + drawn).ravel(), minlength=_RESAMPLES_AT_ONCE * num_rows)
        found.append(figures(counts.reshape(_RESAMPLES_AT_ONCE, num_rows).astype(np.float64)))
    lows, highs = np.quantile(np.concatenate(found), (0.025, 0.975), axis=0)
    return lows, highs


def share_interval(num_hits: int, num_rows: int, tail: float = 0.025) -> tuple[float, float]:
    """Return the exact interval of a binomial variable's probability (Clopper and Pearson 1934).

    Each end is wrong with a probability of at most `tail`.
    """
    return _least_share(num_hits, num_rows, tail), 1 - _least_share(num_rows - num_hits, num_rows, tail)


def difference_interval(gained: int, lost: int, num_rows: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares of right rows that were measured on the same rows.

    `gained` rows flip from wrong to right, and `lost` rows from right to wrong. The difference is (2s - 1) · r,
    with the share s of gains among the flips and the share r of flips among all rows. Both have exact intervals:
    each end is wrong with a probability of at most 2 % because of s, and of 0.5 % because of r. So 0 is outside
    if McNemar's exact test finds a difference at the level of 4 %, as of 6 gains without a loss.
    """
    flips = gained + lost
    low, high = (2 * share - 1 for share in share_interval(gained, flips, tail=0.02))
    rarest, most_frequent = share_interval(flips, num_rows, tail=0.005)
    return low * (most_frequent if low < 0 else rarest), high * (most_frequent if high > 0 else rarest)


def _least_share(num_hits: int, num_rows: int, tail: float) -> float:
    """Return the least p at which a binomial variable reaches `num_hits` with at least the probability `tail`."""
    low, high = 0.0, 1.0
    numbers = range(num_hits, num_rows + 1)
    ways = [math.lgamma(num_rows + 1) - math.lgamma(k + 1) - math.lgamma(num_rows - k + 1) for k in numbers]
    for _ in range(50 if num_hits else 0):
        p = (low + high) / 2
        reached = math.fsum(
            math.exp(way + k * math.log(p) + (num_rows - k) * math.log1p(-p))
            for k, way in zip(numbers, ways, strict=True)
        )
        low, high = (low, p) if reached > tail else (p, high)
    return low


def _confusion(options: range | list[int], counts: npt.NDArray[np.int64]) -> Confusion:
    return Confusion(tuple(options), tuple(tuple(row) for row in counts.tolist()))
