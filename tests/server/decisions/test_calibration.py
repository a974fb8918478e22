"""Fitted temperatures, next to a grid and to the temperature that rows were drawn with."""

import random

import numpy as np
import pytest

from server.decisions.answers import probabilities
from server.decisions.calibration import cross_fitted, fit_temperature, folds_of, log_loss, objective


def drawn(temperature: float, num_rows: int, num_options: int = 4) -> tuple[list[list[float]], list[int]]:
    """Return random scores, and answers drawn from their softmax at this temperature."""
    rng = random.Random(0)
    scores = [[rng.gauss(0, 3) for _ in range(num_options)] for _ in range(num_rows)]
    answers = [rng.choices(range(num_options), probabilities(row, temperature))[0] for row in scores]
    return scores, answers


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_answers_is_found(temperature: float) -> None:
    found = fit_temperature(*drawn(temperature, 2000))
    assert found == pytest.approx(temperature, rel=0.1)


def test_no_other_temperature_is_likelier() -> None:
    scores, answers = drawn(1.7, 60)
    found = fit_temperature(scores, answers)
    best = objective(scores, answers, found)
    assert all(best <= objective(scores, answers, n / 100) + 1e-9 for n in range(5, 2000))
    assert log_loss(scores, answers, found) < log_loss(scores, answers, 1.0)


def test_a_few_rows_that_are_all_right_make_no_answer_certain() -> None:
    scores = [[1.0, 0.0]] * 30
    found = fit_temperature(scores, [0] * 30)
    assert found < 1
    assert probabilities(scores[0], found)[0] < 0.995


def test_useless_scores_become_nearly_equal_probabilities() -> None:
    scores = [[5.0, 0.0]] * 30
    found = fit_temperature(scores, [0, 1] * 15)
    assert probabilities(scores[0], found)[0] < 0.7


def test_cross_fitting_never_uses_a_row_for_its_own_temperature() -> None:
    """If row 3's answer changes, then all other folds' probabilities change, and those of its own fold don't."""
    folds = folds_of(30)
    assert np.bincount(folds).tolist() == [6] * 5
    scores, answers = drawn(2.0, 30)
    found = cross_fitted(scores, answers)
    answers[3] = (answers[3] + 1) % 4
    changed = np.any(cross_fitted(scores, answers) != found, axis=1)
    assert (changed == (folds != folds[3])).all()
    others = np.flatnonzero(folds != folds[0])
    temperature = fit_temperature([scores[row] for row in others], [answers[row] for row in others])
    assert cross_fitted(scores, answers)[0] == pytest.approx(probabilities(scores[0], temperature))
