"""Verdicts: intervals that cover what they say, and no verdict from a few held-out rows."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from server.decisions.quality import difference_interval
from server.training.decisions import row_measures
from server.training.encoding import Example, Examples, Reference
from server.training.evaluate import Evaluation, Scores
from server.training.job_data import DataFacts, JobData
from server.training.spec import Metric
from server.training.verdicts import MIN_HELD_OUT, compare, compare_held_out
from tests.server.training.reports.decisions_kit import decision_data, decision_evaluation, sharp_scores

Rows = Sequence[tuple[float, int]]


def references(count: int, first: int = 0) -> list[Reference]:
    return [Reference((number,), "x", 1) for number in range(first, first + count)]


def data_of(held_out: Sequence[Reference] = (), trained: Sequence[Reference] = ()) -> JobData:
    examples = Examples([Example((1, 2), (False, True))])
    return JobData(examples, examples, held_out, DataFacts("d", 1, 2, 1, 0), "b", trained)


def evaluation(rows: Rows, matches: Sequence[bool] | None = None) -> Evaluation:
    total = sum(count for _, count in rows)
    loss = sum(loss for loss, _ in rows) / total
    return Evaluation(loss, 0.5, len(rows), total, tuple(rows), None if matches is None else tuple(matches))


def pair(rng: np.random.Generator, num_rows: int, effect: float) -> tuple[Evaluation, Evaluation]:
    """Two evaluations of rows of 1 to 29 tokens; the first one's loss per token is lower by `effect`."""
    counts = rng.integers(1, 30, num_rows)
    losses = rng.gamma(2.0, 1.0, num_rows) * counts
    differences = (rng.normal(0, 0.5, num_rows) + effect) * counts
    rows, others = (
        [(float(loss), int(count)) for loss, count in zip(of, counts, strict=True)]
        for of in (losses - differences, losses)
    )
    return evaluation(rows), evaluation(others)


def test_the_standard_error_of_losses_is_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    tuned, other = pair(rng, 60, 0.1)
    found = compare_held_out(tuned, other, data_of(), "loss")
    assert found is not None
    differences = np.array([one - two for (one, _), (two, _) in zip(tuned.rows, other.rows, strict=True)])
    counts = np.array([count for _, count in tuned.rows])
    drawn = rng.integers(0, 60, (20_000, 60))
    ratios = differences[drawn].sum(1) / counts[drawn].sum(1)
    assert found.standard_error == pytest.approx(ratios.std(), rel=0.05)
    assert found.difference == pytest.approx(tuned.loss - other.loss)
    assert found.low is not None
    assert found.high is not None
    assert (found.low + found.high) / 2 == pytest.approx(found.difference)


@pytest.mark.parametrize("num_rows", [20, 40, 200])
def test_equal_losses_are_rarely_judged(num_rows: int) -> None:
    """A verdict about weights that are equally good is wrong in about 5 % of cases; large effects are seen."""
    rng = np.random.default_rng(num_rows)
    verdicts = []
    for _ in range(1000):
        found = compare_held_out(*pair(rng, num_rows, 0.0), data_of(), "loss")
        assert found is not None
        verdicts.append(found.verdict)
    assert 0.02 < 1 - verdicts.count("can't tell") / 1000 < 0.08
    for effect, verdict in ((1.0, "better"), (-1.0, "worse")):
        found = compare_held_out(*pair(rng, num_rows, effect), data_of(), "loss")
        assert found is not None
        assert found.verdict == verdict


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [
        (25, 0, "better"),
        (6, 0, "better"),
        (5, 0, "can't tell"),
        (3, 0, "can't tell"),
        (0, 0, "can't tell"),
        (1, 6, "can't tell"),
        (0, 5, "can't tell"),
        (0, 6, "worse"),
        (9, 2, "can't tell"),
        (10, 1, "better"),
    ],
)
def test_matches_are_judged_in_pairs(gained: int, lost: int, verdict: str) -> None:
    """By McNemar's exact test: 5 gains without a loss are heads five times in a row, which is no proof."""
    num_rows, both = 28, 2 if gained < 20 else 0
    tuned = [True] * gained + [False] * lost + [True] * both
    other = [False] * gained + [True] * lost + [True] * both
    tuned, other = (found + [False] * (num_rows - len(found)) for found in (tuned, other))
    data = data_of(trained=references(num_rows))
    found = compare(Scores(None, tuple(tuned)), Scores(None, tuple(other)), data, "loss")
    assert found is not None
    assert (found.metric, found.num_rows, found.includes_trained) == ("exact_match", 28, True)
    assert found.verdict == verdict
    assert found.difference == pytest.approx((gained - lost) / num_rows)
    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9
    rarer = sum(math.comb(gained + lost, k) for k in range(max(gained, lost), gained + lost + 1))
    is_significant = 2 * rarer / 2 ** (gained + lost) <= 0.05
    assert (found.verdict != "can't tell") is is_significant


def test_the_interval_of_matches_is_that_of_evaluations() -> None:
    gains = [(True, False)] * 9 + [(False, True)] + [(True, True)] * 10
    tuned, other = (Scores(None, found) for found in zip(*gains, strict=True))
    found = compare(tuned, other, data_of(trained=references(20)), "loss")
    assert found is not None
    assert (found.low, found.high) == difference_interval(9, 1, 20)
    few = compare(Scores(None, (True,) * 3), Scores(None, (False,) * 3), data_of(trained=references(3)), "loss")
    assert few is not None
    assert few.verdict == "can't tell"


def test_equal_adapters_are_rarely_judged_by_matches() -> None:
    rng = random.Random(0)
    num_judged = 0
    for _ in range(2000):
        right = [tuple(rng.random() < 0.3 for _ in range(30)) for _ in range(2)]
        found = compare(Scores(None, right[0]), Scores(None, right[1]), data_of(trained=references(30)), "loss")
        assert found is not None
        num_judged += found.verdict != "can't tell"
    assert num_judged / 2000 < 0.06


def test_facts_are_judged_by_what_was_remembered() -> None:
    """README's example: the loss of three held-out rows prefers an early step, which has learnt nothing."""
    held_out, trained = references(3), references(25, 3)
    data = data_of(held_out, trained)
    none = (False,) * 3
    early = Scores(evaluation([(10.0, 5)] * 2 + [(11.0, 6)], none), (False,) * 25)
    late = Scores(evaluation([(14.0, 5)] * 2 + [(15.0, 6)], none), (True,) * 25)
    assert late.held_out is not None
    assert early.held_out is not None
    assert late.held_out.loss > early.held_out.loss
    assert compare_held_out(late.held_out, early.held_out, data, "loss") is None
    found = compare(late, early, data, "loss")
    assert found is not None
    assert (found.verdict, found.num_rows, found.includes_trained) == ("better", 28, True)


def test_few_rows_without_completions_allow_no_verdict() -> None:
    rows = [(1.0 + number / 100, 5) for number in range(MIN_HELD_OUT - 1)]
    worse = [(loss + 3, count) for loss, count in rows]
    found = compare(Scores(evaluation(rows)), Scores(evaluation(worse)), data_of(), "loss")
    assert found is not None
    assert (found.metric, found.verdict, found.low, found.high) == ("loss", "can't tell", None, None)
    assert not found.is_gain
    one_more = Scores(evaluation([*rows, (1.0, 5)])), Scores(evaluation([*worse, (4.0, 5)]))
    found = compare(*one_more, data_of(), "loss")
    assert found is not None
    assert found.verdict == "better"
    assert compare(Scores(), Scores(), data_of(), "loss") is None


def test_a_metric_is_judged_on_held_out_rows_if_there_are_enough() -> None:
    held_out, trained = references(MIN_HELD_OUT), references(30, 100)
    data = data_of(held_out, trained)
    rows = [(float(number), 5) for number in range(1, MIN_HELD_OUT + 1)]
    right, wrong = (True,) * MIN_HELD_OUT, (False,) * MIN_HELD_OUT
    tuned = Scores(evaluation([(loss - 0.9, count) for loss, count in rows], wrong), (True,) * 30)
    other = Scores(evaluation(rows, right), (False,) * 30)
    by_loss, by_match = compare(tuned, other, data, "loss"), compare(tuned, other, data, "exact_match")
    assert by_loss is not None
    assert by_match is not None
    assert (by_loss.metric, by_loss.verdict, by_loss.includes_trained) == ("loss", "better", False)
    assert (by_match.metric, by_match.verdict, by_match.num_rows) == ("exact_match", "worse", MIN_HELD_OUT)


def test_equal_rows_count_once() -> None:
    """Thirty copies of a reference are one row: they support no verdict."""
    data = data_of(references(1) * 30)
    rows = [(30.0, 30)]
    right, wrong = evaluation(rows, (True,) * 30), evaluation(rows, (False,) * 30)
    assert compare_held_out(right, wrong, data, "exact_match") is None
    assert compare_held_out(right, wrong, data, "loss") is None
    found = compare(Scores(right), Scores(replace(wrong)), data, "loss")
    assert found is not None
    assert (found.num_rows, found.verdict) == (1, "can't tell")


def test_decisions_are_judged_by_accuracy() -> None:
    """As matches are: 6 gains without a loss are better, and 5 aren't."""
    data = decision_data([0] * 40)
    right, wrong = (0.0, -3.0, -3.0), (-3.0, 0.0, -3.0)
    other = decision_evaluation([wrong] * 40)
    for num_gained, verdict in ((6, "better"), (5, "can't tell")):
        tuned = decision_evaluation([right] * num_gained + [wrong] * (40 - num_gained))
        found = compare_held_out(tuned, other, data, "accuracy")
        assert found is not None
        assert (found.metric, found.num_rows, found.verdict) == ("accuracy", 40, verdict)
        assert found.difference == pytest.approx(num_gained / 40)
        turned = compare_held_out(other, tuned, data, "accuracy")
        assert turned is not None
        assert turned.verdict == ("worse" if verdict == "better" else verdict)
        assert f"{num_gained} of 40 held-out rows decided right, against 0" in found.sentence("base")


def test_decisions_are_judged_by_a_paired_t_test_of_brier_scores() -> None:
    answers = [n % 3 for n in range(60)]
    data = decision_data(answers)
    sure, unsure = (
        decision_evaluation(
            [tuple(gap * (k == one) + math.sin(n + k) for k in range(3)) for n, one in enumerate(answers)]
        )
        for gap in (3.0, 1.0)
    )
    found = compare_held_out(sure, unsure, data, "brier")
    assert found is not None
    briers = np.array([row_measures(data, one)[1] for one in (sure, unsure)])
    differences = briers[0] - briers[1]
    error = differences.std(ddof=1) / math.sqrt(60)
    t95 = 2.000995  # Student's quantile for 59 degrees of freedom
    assert (found.tuned, found.other) == pytest.approx(tuple(briers.mean(1)))
    assert (found.low, found.high) == pytest.approx(
        (differences.mean() - t95 * error, differences.mean() + t95 * error), abs=1e-6
    )
    assert (found.verdict, found.is_gain) == ("better", True)  # lower is better
    turned = compare_held_out(unsure, sure, data, "brier")
    assert turned is not None
    assert (turned.verdict, turned.is_loss) == ("worse", True)
    assert found.sentence("base").startswith("better than base: Brier score 0.")


@pytest.mark.parametrize("metric", ["accuracy", "brier"])
def test_few_decisions_allow_no_verdict(metric: Metric) -> None:
    for num_rows, is_judged in ((MIN_HELD_OUT - 1, False), (MIN_HELD_OUT, True)):
        data = decision_data([n % 3 for n in range(num_rows)])
        found = decision_evaluation(sharp_scores(num_rows))
        assert (compare_held_out(found, found, data, metric) is not None) is is_judged
    assert compare_held_out(found, evaluation([(1.0, 5)] * 20), data, metric) is None
