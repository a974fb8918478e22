"""Statistics of an evaluation: each metric with its 95 % interval, paired differences, and flips.

Every metric is a ratio of sums over rows, such as summed losses over counted tokens. Each adapter is compared with
the first one on the same rows. Intervals of shares of rows are exact (Clopper and Pearson 1934), and so are those
of their differences. Other intervals are a percentile bootstrap over rows with a fixed seed; fewer than
`MIN_BOOTSTRAP_ROWS` rows have none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.decisions.quality import bootstrap, difference_interval, share_interval
from server.jobs.evaluate_spec import MAX_TEXT_BYTES, SHARES, EvaluateSpec, Metric
from server.jobs.evaluation_data import EvaluatedRow, EvaluationData
from server.jobs.scoring import is_exact
from server.training.json_schema import is_valid

MAX_FLIPS = 1000
"""The most flips that an evaluation lists. All of them are counted."""
MAX_TEXTS_BYTES = 32 << 20
"""About the most bytes of all stored completions of an evaluation."""
MIN_BOOTSTRAP_ROWS = 20
"""Resamples of fewer rows are too alike: their intervals would be too narrow."""

Array = npt.NDArray[np.float64]
Result = Mapping[str, object]
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class TokenSums:
    """Sums over the counted tokens of a row. Each window of a split row counts."""

    loss: float  # nats
    num_right: int
    num_tokens: int


@dataclass(frozen=True)
class Answers:
    """One adapter's answers to all rows. An entry is None if the row wasn't measured in that way."""

    losses: Mapping[str, float]  # by data set: nats per counted token
    tokens: Sequence[TokenSums | None]
    completions: Sequence[str | None]
    probabilities: Sequence[tuple[float, ...] | None]  # of a decision's options


@dataclass(frozen=True)
class Completed:
    """A judged completion. Its text is cut if it is long, and None if there was no room for one.

    `is_valid` says whether it is JSON that satisfies the row's schema; None if the row has none.
    """

    text: str | None
    is_exact: bool
    is_valid: bool | None = None


@dataclass(frozen=True)
class Decided:
    """A judged decision: the index of the likeliest option, and the Brier score."""

    chosen: int
    brier: float


@dataclass(frozen=True)
class Measured:
    """One adapter's judged answers to all rows, as checkpoints store them. None is as in `Answers`."""

    losses: Mapping[str, float]
    tokens: Sequence[TokenSums | None]
    completions: Sequence[Completed | None]
    decisions: Sequence[Decided | None]


@dataclass(frozen=True)
class Findings:
    """The JSON of a finished evaluation."""

    results: Sequence[Result]
    differences: Sequence[Result]
    flips: Sequence[Result]


def judge(answers: Answers, data: EvaluationData, max_text_bytes: int = MAX_TEXT_BYTES) -> Measured:
    """Judge an adapter's answers. Keep at most `max_text_bytes` of each completion."""
    completions: list[Completed | None] = []
    decisions: list[Decided | None] = []
    for row, text, distribution in zip(data.rows, answers.completions, answers.probabilities, strict=True):
        if row.reference is None:
            completions.append(None)
        else:
            shown = None if text is None else shortened(text, max_text_bytes)
            valid = None if row.schema is None else text is not None and is_valid(text, row.schema)
            completions.append(Completed(shown, is_exact(text, row.reference), valid))
        if row.asked is None or distribution is None:
            decisions.append(None)
        else:
            brier = sum((p - (option == row.asked.answer)) ** 2 for option, p in enumerate(distribution))
            decisions.append(Decided(int(np.argmax(distribution)), brier))
    return Measured(answers.losses, answers.tokens, completions, decisions)


def max_text_bytes(data: EvaluationData, num_adapters: int) -> int:
    """Return the most bytes of each completion, so that all of them take about `MAX_TEXTS_BYTES` at most."""
    num_texts = num_adapters * sum(row.reference is not None for row in data.rows)
    return min(MAX_TEXT_BYTES, MAX_TEXTS_BYTES // max(num_texts, 1))


def shortened(text: str, max_bytes: int) -> str:
    """Return the text if it has at most `max_bytes` in UTF-8, else its beginning with a note of its length."""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return f"{encoded[:max_bytes].decode(errors='ignore')}… (cut, of {len(encoded):,} bytes)"


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
        self._bootstrapped: Sequence[Interval] = ()  # of all values, then of all differences
        if metric not in SHARES and len(places) >= MIN_BOOTSTRAP_ROWS:
            lows, highs = bootstrap(len(places), self._resampled)
            self._bootstrapped = [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]

    def results(self) -> Iterator[Result]:
        num_rows = len(self._places)
        for number, (name, value) in enumerate(zip(self._names, self._values, strict=True)):
            low, high = self._interval(number)
            if self._metric in SHARES:
                low, high = share_interval(round(self._above[number].sum()), num_rows)
            yield {"adapter": name, **self._about, "value": value, "low": low, "high": high, "n": num_rows}

    def differences(self) -> Iterator[Result]:
        num_rows = len(self._places)
        for number in range(1, len(self._names)):
            low, high = self._interval(len(self._names) + number - 1)
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

    def _interval(self, number: int) -> Interval:
        return self._bootstrapped[number] if self._bootstrapped else (None, None)

    def _resampled(self, counts: Array) -> Array:
        values: Array = counts @ self._above.T / (counts @ self._below)[:, None]  # (resamples, adapters)
        return np.concatenate([values, values[:, 1:] - values[:, :1]], axis=1)

    def _changes(self, number: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return which rows only the adapter `number` gets right, and which only the first adapter gets right."""
        first, other = self._above[0] > 0, self._above[number] > 0
        return other & ~first, first & ~other

    def _answer(self, measured: Measured, place: int) -> str | bool | None:
        completed, decided = measured.completions[place], measured.decisions[place]
        if self._metric != "accuracy":
            assert completed is not None, "a completion"
            return completed.text
        asked = self._data.rows[place].asked
        assert decided is not None, "a decision"
        assert asked is not None, "a decision"
        value = self._data.values[asked.question][decided.chosen]
        return shortened(value, MAX_TEXT_BYTES) if isinstance(value, str) else value


def _ratio(metric: Metric, row: EvaluatedRow, measured: Measured, place: int) -> tuple[float, float] | None:
    """Return what the row adds to the metric's numerator and denominator, or None if the metric doesn't fit it."""
    if metric in ("loss", "token_accuracy"):
        tokens = measured.tokens[place]
        if tokens is None:
            return None
        return (tokens.loss if metric == "loss" else tokens.num_right), tokens.num_tokens
    if metric == "exact_match":
        completed = measured.completions[place]
        return None if completed is None else (completed.is_exact, 1)
    if metric == "json_valid":
        completed = measured.completions[place]
        return None if completed is None or completed.is_valid is None else (completed.is_valid, 1)
    decided = measured.decisions[place]
    if row.asked is None or decided is None:
        return None
    return (decided.chosen == row.asked.answer if metric == "accuracy" else decided.brier), 1
