"""Measure how good classifiers' probabilities are on test rows, with a fitted temperature and without.

Intervals are of 95 %, by a bootstrap over the articles and reviews that the rows come from. Differences are paired
by row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.decisions.data import DataSet
from benchmarks.decisions.methods import ADAPTER, Scored
from server.decisions.calibration import softmax
from server.decisions.quality import Array, Estimate, MeasuredDecisions, bootstrap


@dataclass(frozen=True)
class Quality:
    """A method's figures on test rows. A temperature doesn't change the accuracy."""

    settings: str
    temperature: float
    accuracy: Estimate
    brier: Estimate  # without a temperature
    calibration_error: Estimate
    brier_fitted: Estimate  # with the temperature
    calibration_error_fitted: Estimate
    brier_change: Estimate  # with minus without
    calibration_error_change: Estimate
    accuracy_difference: Estimate  # from the adapter: positive if this method is more often right
    brier_difference: Estimate  # from the adapter, both with their temperatures: negative if this one is better


@dataclass(frozen=True)
class Outcome:
    """All methods' figures on a data set."""

    title: str
    type: str  # of the question
    num_options: int
    num_train: int
    num_validation: int
    num_test: int
    num_sources: int  # of the test rows: articles, reviews and others
    methods: dict[str, Quality]


def measure(data: DataSet, scored: Mapping[str, Scored]) -> Outcome:
    """Return the figures of all methods, which include the adapter."""
    answers = [row.answer for row in data.test]
    names = sorted({row.source for row in data.test})
    numbers = {name: number for number, name in enumerate(names)}
    source = np.array([numbers[row.source] for row in data.test])
    decided = {
        name: (
            MeasuredDecisions(softmax(one.scores), answers),
            MeasuredDecisions(softmax(one.scores, one.temperature), answers),
        )
        for name, one in scored.items()
    }

    def figures(counts: Array) -> Array:
        """Return figures of each resample, (resamples, methods · 9), from how often each source is drawn."""
        of_rows = counts[:, source]
        columns = {name: np.stack([_plain(of_rows, one) for one in pair]) for name, pair in decided.items()}
        ours = columns[ADAPTER]
        found = []
        for plain, fitted in columns.values():
            found += [plain, fitted[:, 1:], (fitted - plain)[:, 1:], (fitted - ours[1])[:, :2]]
        return np.concatenate(found, axis=1)

    values = figures(np.ones((1, len(names))))[0]
    lows, highs = bootstrap(len(names), figures)
    estimates = iter(
        Estimate(float(value), float(min(low, value)), float(max(high, value)))
        for value, low, high in zip(values, lows, highs, strict=True)
    )
    methods = {
        name: Quality(one.settings, one.temperature, *(next(estimates) for _ in range(9)))
        for name, one in scored.items()
    }
    return Outcome(
        data.title,
        data.question.type,
        len(data.question.options),
        *(len(data.train), len(data.validation), len(data.test), len(names)),
        methods,
    )


def _plain(counts: Array, decided: MeasuredDecisions) -> Array:
    """Return (accuracy, Brier score, calibration error) of each resample; `counts` is shaped (resamples, rows)."""
    gaps = np.zeros((decided.num_rows, decided.num_bins))
    gaps[np.arange(decided.num_rows), decided.bins] = decided.confidences - decided.is_right
    sums = [counts @ decided.is_right, counts @ decided.brier_scores, np.abs(counts @ gaps).sum(1)]
    found: Array = np.stack(sums, axis=1) / counts.sum(1, keepdims=True)
    return found
