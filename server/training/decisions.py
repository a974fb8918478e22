"""Measures of held-out decisions: temperatures, rows for verdicts, and what the report says about each question.

All of it follows from the scores of the options (`Evaluation.option_scores`). Equal rows count once, so that no
temperature is fitted to a row and then judged by its copy. Test rows have the temperatures that were fitted to the
held-out rows; held-out rows have their own, by cross-fitting.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Literal

import numpy as np

from server.decisions.calibration import MIN_ROWS, cross_fitted, fit_temperature, softmax
from server.decisions.quality import Array, MeasuredDecisions
from server.decisions.questions import Question
from server.system.messages import plural
from server.training.encoding import Asked
from server.training.evaluate import Evaluation
from server.training.job_data import JobData

_WIDE = 0.2
"""An interval of accuracy wider than this calls for more held-out rows."""


class QuestionScores:
    """One question's rows: the options' log-probabilities, shaped (rows, options), and right answers."""

    def __init__(self, rows: Mapping[Asked, tuple[float, ...]], fitted: "QuestionScores | None" = None) -> None:
        """`fitted` has the held-out rows, if `rows` are test rows."""
        self._fitted = fitted
        self.scores: Array = np.asarray(list(rows.values()), dtype=np.float64)
        self.answers = np.asarray([one.answer for one in rows])

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def kind(self) -> Literal["held-out", "test"]:
        return "held-out" if self._fitted is None else "test"

    @cached_property
    def temperature(self) -> float | None:
        """The likeliest temperature for the held-out rows, or None if there are fewer than `MIN_ROWS` of them."""
        if self._fitted is not None:
            return self._fitted.temperature
        return fit_temperature(self.scores, self.answers) if len(self) >= MIN_ROWS else None

    @cached_property
    def uncalibrated(self) -> MeasuredDecisions:
        return MeasuredDecisions(softmax(self.scores), self.answers)

    @cached_property
    def calibrated(self) -> MeasuredDecisions:
        """The decisions with temperatures, or without if there are too few held-out rows."""
        if self.temperature is None:
            return self.uncalibrated
        if self._fitted is not None:
            return MeasuredDecisions(softmax(self.scores, self.temperature), self.answers)
        return MeasuredDecisions(cross_fitted(self.scores, self.answers), self.answers)


def by_question(
    data: JobData, evaluation: Evaluation | None, fitted: Mapping[str, QuestionScores] | None = None
) -> dict[str, QuestionScores]:
    """Return the scored rows by the questions' digests. Empty if no options were scored.

    If the rows are test rows, `fitted` has the held-out rows in the same way.
    """
    if evaluation is None or evaluation.option_scores is None:
        return {}
    groups: dict[str, dict[Asked, tuple[float, ...]]] = {}
    for one, scores in zip(data.asked, evaluation.option_scores, strict=True):
        if scores:
            groups.setdefault(one.question, {}).setdefault(one, scores)
    if fitted is None:
        return {digest: QuestionScores(rows) for digest, rows in groups.items()}
    none = QuestionScores({})
    return {digest: QuestionScores(rows, fitted.get(digest, none)) for digest, rows in groups.items()}


def fit_temperatures(data: JobData, evaluation: Evaluation | None) -> dict[str, float]:
    """Return temperatures by the digests of the questions that have at least `MIN_ROWS` rows."""
    found = {digest: group.temperature for digest, group in by_question(data, evaluation).items()}
    return {digest: temperature for digest, temperature in found.items() if temperature is not None}


def row_measures(
    data: JobData, evaluation: Evaluation | None, fitted: Mapping[str, QuestionScores] | None = None
) -> tuple[list[bool], list[float]]:
    """Return for all questions' rows whether the decision is right, and its Brier score.

    `fitted` is as in `by_question`.
    """
    decided = [group.calibrated for group in by_question(data, evaluation, fitted).values()]
    are_right = [bool(one) for group in decided for one in group.is_right]
    return are_right, [float(one) for group in decided for one in group.brier_scores]


def question_reports(
    data: JobData,
    evaluations: Mapping[str, Evaluation | None],
    on_test: Mapping[str, Evaluation | None] | None = None,
) -> dict[str, object] | None:
    """Return the report's entries by the questions' names, or None if the job has no decisions.

    `evaluations` are by the names of weights: `base`, `tuned`, and maybe `latest` and `parent`. If a question has
    test rows, its entry is about these: `on_test` has their evaluations, and none of `latest` and `parent`.
    """
    if data.decisions is None:
        return None
    groups = {name: by_question(data, evaluation) for name, evaluation in evaluations.items()}
    if on_test is not None and data.of_test is not None:
        found = {name: by_question(data.of_test, one, groups[name]) for name, one in on_test.items()}
        untested = {
            name: {digest: group for digest, group in of_all.items() if digest not in found["tuned"]}
            for name, of_all in groups.items()
        }
        groups = {name: {**of_others, **found.get(name, {})} for name, of_others in untested.items()}
    return {
        question.name or "": _question_report(
            question, {name: found.get(question.digest) for name, found in groups.items()}
        )
        for question in data.decisions.questions
    }


def _question_report(question: Question, groups: Mapping[str, QuestionScores | None]) -> dict[str, object]:
    tuned = groups["tuned"]
    if tuned is None:
        return {
            "rows": "held-out",
            "num_rows": 0,
            "summary": "No held-out row was measured, so its quality is unknown.",
        }
    confusion = tuned.calibrated.confusion()
    return {
        "rows": tuned.kind,
        "num_rows": len(tuned),
        "temperature": tuned.temperature,
        **{name: None if group is None else _measures(group) for name, group in groups.items()},
        "reliability": [asdict(one) for one in tuned.calibrated.reliability()] if len(tuned) >= MIN_ROWS else [],
        "confusion": {
            "options": [question.options[index].text for index in confusion.options],
            "counts": [list(row) for row in confusion.counts],
        },
        "summary": _summary(question, tuned, groups["base"]),
    }


def _measures(group: QuestionScores) -> dict[str, object]:
    """Return the figures with their intervals. Few rows have only an accuracy, whose interval is exact."""
    found = group.calibrated.figures
    if len(group) < MIN_ROWS:
        return {"accuracy": asdict(found["accuracy"])}
    without = group.uncalibrated.figures
    return {
        **{name: asdict(estimate) for name, estimate in found.items()},
        "uncalibrated": {name: asdict(without[name]) for name in ("brier", "calibration_error")},
    }


def _summary(question: Question, group: QuestionScores, base: QuestionScores | None) -> str:
    """Return sentences that say how far to trust the decisions."""
    decided, num_rows = group.calibrated, len(group)
    accuracy = decided.figures["accuracy"]
    counts = np.bincount(decided.answers, minlength=decided.num_options)
    most = int(counts.argmax())
    others = [f"always answering {question.options[most].text} is right on {counts[most]}"]
    if base is not None:
        others.insert(0, f"the base on {base.calibrated.is_right.sum()}")
    rows = plural(num_rows, f"{group.kind} row")
    found = [
        f"Right on {decided.is_right.sum()} of {rows} ({', '.join(others)}): expect "
        f"{accuracy.low:.0%} to {accuracy.high:.0%} right answers on rows like these."
    ]
    if accuracy.high - accuracy.low > _WIDE:
        found.append(f"More {group.kind} rows would narrow this.")
    if num_rows < MIN_ROWS or group.temperature is None:
        needed = "fit and measure" if group.temperature is None else "measure"
        kind = "held-out" if group.temperature is None else group.kind
        found.append(f"Don't trust its probabilities: {MIN_ROWS} {kind} rows are needed to {needed} them.")
        return " ".join(found)
    error, before = (one.figures["calibration_error"].value for one in (decided, group.uncalibrated))
    found.append(
        f"Confidence and accuracy differ by {error:.1%} on average, and by {before:.1%} without the temperature."
    )
    return " ".join(found)
