"""Calibration: the temperature at which a question's probabilities agree best with known answers.

A temperature is the only parameter, so few rows suffice, and the order of the options doesn't change (Guo et al.
2017, arXiv:1706.04599). `scores` are the options' log-probabilities, shaped (rows, options). `answers` has the
index of each row's right option.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MIN_ROWS = 20
"""A version stores a temperature if this many rows of the question are held out."""
NUM_FOLDS = 5
_LOWEST, _HIGHEST = 0.05, 20.0
_NUM_STEPS = 40
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(scores: npt.ArrayLike, answers: npt.ArrayLike) -> float:
    """Return the likeliest temperature, from 0.05 to 20.

    The logarithm of the temperature has a standard normal prior. So a few rows that are all answered right don't
    make every later answer certain. The minimum of `objective` is found by golden-section search.
    """
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_NUM_STEPS):
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if objective(scores, answers, math.exp(first)) <= objective(scores, answers, math.exp(second)):
            high = second
        else:
            low = first
    return math.exp((low + high) / 2)


def cross_fitted(scores: npt.ArrayLike, answers: npt.ArrayLike) -> Array:
    """Return probabilities, shaped as `scores`, at temperatures that are fitted to the rows of the other folds."""
    all_scores, all_answers = np.asarray(scores, dtype=np.float64), np.asarray(answers)
    folds = folds_of(len(all_scores))
    found = np.empty_like(all_scores)
    for fold in range(NUM_FOLDS):
        others = folds != fold
        found[~others] = softmax(all_scores[~others], fit_temperature(all_scores[others], all_answers[others]))
    return found


def folds_of(num_rows: int) -> npt.NDArray[np.int64]:
    """Return the fold of each row. They are shuffled by a fixed seed, since rows may alternate between answers."""
    return np.random.default_rng(0).permutation(num_rows) % NUM_FOLDS


def softmax(scores: npt.ArrayLike, temperature: float = 1.0) -> Array:
    """Return softmax(score / temperature) of each row."""
    return np.exp(_log_softmax(scores, temperature))


def objective(scores: npt.ArrayLike, answers: npt.ArrayLike, temperature: float) -> float:
    """Return the sum of -log p(answer) over the rows, in nats, and half the square of log(temperature)."""
    num_rows = len(np.asarray(answers))
    return num_rows * log_loss(scores, answers, temperature) + math.log(temperature) ** 2 / 2


def log_loss(scores: npt.ArrayLike, answers: npt.ArrayLike, temperature: float) -> float:
    """Return the mean of -log p(answer) over the rows, in nats."""
    found = _log_softmax(scores, temperature)
    return float(-found[np.arange(len(found)), np.asarray(answers)].mean())


def _log_softmax(scores: npt.ArrayLike, temperature: float) -> Array:
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    found: Array = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    return found
