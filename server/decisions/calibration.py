"""Calibration: the temperature at which a question's probabilities agree best with known answers.

A temperature is the only parameter, so few rows suffice, and the order of the options doesn't change (Guo et al.
2017, arXiv:1706.04599).
"""

import math
from collections.abc import Sequence

from server.decisions.answers import probabilities

MIN_ROWS = 20
"""A temperature is fitted to at least this many rows of a question."""
_LOWEST, _HIGHEST = 0.05, 20.0
_NUM_STEPS = 40
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float | None:
    """Return the likeliest temperature, from 0.05 to 20, or None for too few rows.

    `scores` are the options' log-probabilities for each row, and `answers` the index of each row's right option.
    The logarithm of the temperature has a standard normal prior. So a few rows that are all answered right don't
    make every later answer certain. The minimum of `objective` is found by golden-section search.
    """
    if len(scores) < MIN_ROWS:
        return None
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_NUM_STEPS):
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if objective(scores, answers, math.exp(first)) <= objective(scores, answers, math.exp(second)):
            high = second
        else:
            low = first
    return math.exp((low + high) / 2)


def objective(scores: Sequence[Sequence[float]], answers: Sequence[int], temperature: float) -> float:
    """Return the sum of -log p(answer) over the rows, in nats, and half the square of log(temperature)."""
    return len(scores) * log_loss(scores, answers, temperature) + math.log(temperature) ** 2 / 2


def log_loss(scores: Sequence[Sequence[float]], answers: Sequence[int], temperature: float) -> float:
    """Return the mean of -log p(answer) over the rows, in nats."""
    found = (probabilities(row, temperature)[right] for row, right in zip(scores, answers, strict=True))
    return math.fsum(-math.log(max(p, 1e-300)) for p in found) / len(scores)
