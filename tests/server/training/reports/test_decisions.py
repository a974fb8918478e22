"""What the report says about decisions, next to plain formulas."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from server.decisions.answers import probabilities
from server.decisions.calibration import fit_temperature, folds_of
from server.decisions.questions import parse_question
from server.decisions.stored import StoredDecisions
from server.training.decisions import fit_temperatures, question_reports, row_measures
from server.training.encoding import Asked
from server.training.evaluate import Evaluation
from server.training.job_data import JobData
from tests.server.training.reports.decisions_kit import (
    QUESTION,
    decision_data,
    decision_evaluation,
    sharp_scores,
)


def reports(data: JobData, scores: Sequence[tuple[float, ...]], base: Evaluation | None = None) -> dict[str, Any]:
    found = question_reports(data, {"base": base, "tuned": decision_evaluation(scores)})
    assert found is not None
    return found


def test_temperatures_are_fitted_without_the_rows_that_they_scale() -> None:
    data = decision_data([n % 3 for n in range(47)])
    scores = sharp_scores(47)
    briers, folds = [], folds_of(47)
    for n, (row, one) in enumerate(zip(scores, data.asked, strict=True)):
        others = [m for m in range(47) if folds[m] != folds[n]]
        temperature = fit_temperature([scores[m] for m in others], [data.asked[m].answer for m in others])
        found = probabilities(row, temperature)
        briers.append(sum((p - (k == one.answer)) ** 2 for k, p in enumerate(found)))
    report = reports(data, scores)["team"]
    assert report["num_rows"] == 47
    assert report["tuned"]["brier"]["value"] == pytest.approx(sum(briers) / 47)
    assert report["temperature"] == fit_temperature(scores, [one.answer for one in data.asked])
    assert report["tuned"]["brier"]["value"] < report["tuned"]["uncalibrated"]["brier"]["value"]
    assert sum(one["num_rows"] for one in report["reliability"]) == 47
    assert report["confusion"]["options"] == ["billing", "shipping", "sales"]
    assert report["base"] is None


def test_equal_rows_count_once() -> None:
    data = decision_data([n % 3 for n in range(25)])
    scores = sharp_scores(25)
    repeated = replace(data, asked=[*data.asked, *data.asked[:10]])
    once, twice = reports(data, scores), reports(repeated, [*scores, *scores[:10]])
    assert once == twice
    few = decision_evaluation(scores[:1] * 30)
    assert fit_temperatures(replace(data, asked=list(data.asked[:1]) * 30), few) == {}


def test_each_question_has_its_own_figures() -> None:
    spam = parse_question({"type": "predicate", "instructions": "Spam?", "name": "spam"})
    data = decision_data([n % 3 for n in range(25)])
    asked = [*data.asked, *(Asked((n,), spam.digest, 0) for n in range(22))]
    data = replace(data, asked=asked, decisions=StoredDecisions((QUESTION, spam)))
    scores = [*sharp_scores(25), *[(-0.1, -2.0)] * 21, (-2.0, -0.1)]
    found = reports(data, scores)
    assert found["spam"]["tuned"]["accuracy"]["value"] == 21 / 22
    assert found["spam"]["confusion"] == {"options": ["yes", "no"], "counts": [[21, 1], [0, 0]]}
    assert found["team"]["num_rows"] == 25
    assert set(fit_temperatures(data, decision_evaluation(scores))) == {QUESTION.digest, spam.digest}
    are_right, briers = row_measures(data, decision_evaluation(scores))
    assert len(are_right) == len(briers) == 47


def test_the_summary_says_how_far_to_trust_the_answers() -> None:
    data = decision_data([0] * 20 + [1] * 20 + [2] * 6)
    scores = [tuple(0.0 if k == one.answer else -4.0 for k in range(3)) for one in data.asked]
    wrong = [(-4.0, -4.0, 0.0)] * 5
    report = reports(data, [*wrong, *scores[5:]], decision_evaluation([(0.0, -1.0, -1.0)] * 46))["team"]
    assert report["summary"].startswith(
        "Right on 41 of 46 held-out rows (the base on 20, always answering billing is right on 20): expect 76% to "
        "96% right answers on rows like these. Confidence and accuracy differ by "
    )
    assert report["base"]["accuracy"]["value"] == 20 / 46


def test_few_rows_have_only_an_accuracy() -> None:
    data = decision_data([n % 3 for n in range(13)])
    scores = [tuple(0.0 if k == one.answer else -4.0 for k in range(3)) for one in data.asked]
    report = reports(data, [*scores[:12], (-4.0, -4.0, 0.0)])["team"]
    assert set(report["tuned"]) == {"accuracy"}
    assert report["reliability"] == []
    assert report["summary"] == (
        "Right on 12 of 13 held-out rows (always answering billing is right on 5): expect 64% to 100% right "
        "answers on rows like these. More held-out rows would narrow this. Don't trust its probabilities: 20 "
        "held-out rows are needed to fit and measure them."
    )


def test_questions_that_were_not_measured() -> None:
    data = decision_data([0, 1, 2])
    nothing = {
        "rows": "held-out",
        "num_rows": 0,
        "summary": "No held-out row was measured, so its quality is unknown.",
    }
    assert question_reports(data, {"base": None, "tuned": None}) == {"team": nothing}
    assert reports(data, [()] * 3) == {"team": nothing}
    assert question_reports(replace(data, decisions=None), {"base": None, "tuned": None}) is None
