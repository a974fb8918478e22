"""Statistics of an evaluation: each metric with its 95 % interval, paired differences, and flips.

Every metric is a ratio of sums over rows, such as summed losses over counted tokens. Each adapter is compared with
the first one on the same rows. Intervals of shares of rows are exact (Clopper and Pearson 1934), and so are those
of their differences. Other intervals are a percentile bootstrap over rows with a fixed seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.decisions.quality import bootstrap, difference_interval, share_interval
from server.jobs.evaluate_spec import SHARES, EvaluateSpec, Metric
from server.jobs.evaluation_data import EvaluatedRow, EvaluationData
from server.jobs.scoring import is_exact

MAX_FLIPS = 1000
"""The most flips that an evaluation lists. All of them are counted."""

Array = npt.NDArray[np.float64]
Result = Mapping[str, object]


@dataclass(frozen=True)
class TokenSums:
    """Sums over the counted tokens of a row. Each window of a split row counts."""

    loss: float  # nats
    num_right: int
    num_tokens: int


@dataclass(frozen=True)
class Measured:
    """One adapter's answers to all rows. An entry is None if the row wasn't measured in that way."""

    losses: Mapping[str, float]  # by data set: nats per counted token
    tokens: Sequence[TokenSums | None]
    completions: Sequence[str | None]
    probabilities: Sequence[tuple[float, ...] | None]  # of a decision's options


@dataclass(frozen=True)
class Findings:
    """The JSON of a finished evaluation."""

    results: Sequence[Result]
    differences: Sequence[Result]
    flips: Sequence[Result]


def find(spec: EvaluateSpec, data: EvaluationData, measured: Sequence[Measured]) -> Findings:
    """Compute all metrics. `measured` has the measurements of each of the spec's adapters."""
    results: list[Result] = []
    differences: list[Result] = []
    flips: list[Result] = []
    for dataset in spec.datasets:
        places = [place for place, row in enumerate(data.rows) if row.dataset == dataset]
        for metric in spec.metrics:
            used = [place for place in places if _ratio(metric, data.rows[place], measured[0], place) is not None]
            if used:
                of_metric = _Table(metric, dataset, used, spec, data, measured)
                results += of_metric.results()
                differences += of_metric.differences()
                flips += of_metric.flips()
    return Findings(results, differences, flips[:MAX_FLIPS])


class _Table:
    """The values of one metric on one data set, for all adapters."""

    def __init__(
        self,
        metric: Metric,
        dataset: str,
        places: Sequence[int],
        spec: EvaluateSpec,
        data: EvaluationData,
        measured: Sequence[Measured],
    ) -> None:
        """`places` are the indices of the rows that the metric fits."""
        self._metric = metric
        self._names = [candidate.expression for candidate in spec.adapters]
        self._about = {"dataset": dataset, "metric": metric}
        self._places = places
        self._data = data
        self._measured = measured
        ratios = [[_ratio(metric, data.rows[place], one, place) for place in places] for one in measured]
        pairs = np.array(ratios, dtype=np.float64)  # (adapters, rows, 2)
        self._above: Array = pairs[..., 0]
        self._below: Array = pairs[0, :, 1]  # the same for all adapters
        self._values = [float(value) for value in self._above.sum(1) / self._below.sum()]
        if metric == "loss":  # summed exactly, as in a training's report
            self._values = [one.losses[dataset] for one in measured]
        lows, highs = bootstrap(len(places), self._resampled)  # of all values, then of all differences
        self._intervals = [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]

    def results(self) -> Iterator[Result]:
        num_rows = len(self._places)
        for number, (name, value) in enumerate(zip(self._names, self._values, strict=True)):
            low, high = self._intervals[number]
            if self._metric in SHARES:
                low, high = share_interval(round(self._above[number].sum()), num_rows)
            yield {"adapter": name, **self._about, "value": value, "low": low, "high": high, "n": num_rows}

    def differences(self) -> Iterator[Result]:
        num_rows = len(self._places)
        for number in range(1, len(self._names)):
            low, high = self._intervals[len(self._names) + number - 1]
            counts: dict[str, object] = {}
            if self._metric in SHARES:
                gained, lost = (int(rows.sum()) for rows in self._changes(number))
                low, high = difference_interval(gained, lost, num_rows)
                counts = {"gained": gained, "lost": lost}
            yield {
                **self._about,
                "from": self._names[0],
                "to": self._names[number],
                "difference": self._values[number] - self._values[0],
                "low": low,
                "high": high,
                **counts,
            }

    def flips(self) -> Iterator[Result]:
        """Yield the rows that only one of the first adapter and another one gets right."""
        if self._metric not in SHARES:
            return
        for number in range(1, len(self._names)):
            gained, lost = self._changes(number)
            for index in np.flatnonzero(gained | lost).tolist():
                place = self._places[index]
                answers = [self._answer(one, place) for one in (self._measured[0], self._measured[number])]
                yield {
                    **self._about,
                    "row": self._data.rows[place].number,
                    "from": self._names[0],
                    "to": self._names[number],
                    "answers": answers,
                    "gained": bool(gained[index]),
                }

    def _resampled(self, counts: Array) -> Array:
        values: Array = counts @ self._above.T / (counts @ self._below)[:, None]  # (resamples, adapters)
        return np.concatenate([values, values[:, 1:] - values[:, :1]], axis=1)

    def _changes(self, number: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return which rows only the adapter `number` gets right, and which only the first adapter gets right."""
        first, other = self._above[0] > 0, self._above[number] > 0
        return other & ~first, first & ~other

    def _answer(self, measured: Measured, place: int) -> str | bool | None:
        if self._metric == "exact_match":
            return measured.completions[place]
        distribution, asked = measured.probabilities[place], self._data.rows[place].asked
        assert distribution is not None, "a decision"
        assert asked is not None, "a decision"
        return self._data.values[asked.question][int(np.argmax(distribution))]


def _ratio(metric: Metric, row: EvaluatedRow, measured: Measured, place: int) -> tuple[float, float] | None:
    """Return what the row adds to the metric's numerator and denominator, or None if the metric doesn't fit it."""
    tokens, distribution = measured.tokens[place], measured.probabilities[place]
    if metric in ("loss", "token_accuracy"):
        if tokens is None:
            return None
        return (tokens.loss if metric == "loss" else tokens.num_right), tokens.num_tokens
    if metric == "exact_match":
        return None if row.reference is None else (is_exact(measured.completions[place], row.reference), 1)
    if row.asked is None or distribution is None:
        return None
    if metric == "accuracy":
        return int(np.argmax(distribution)) == row.asked.answer, 1
    right = row.asked.answer
    return sum((p - (option == right)) ** 2 for option, p in enumerate(distribution)), 1
