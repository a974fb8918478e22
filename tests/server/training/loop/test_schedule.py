"""Learning rates compared with transformers' schedules.

Ours begins where transformers' is after one step, as a step with a rate of 0 learns nothing.
"""

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from server.training.spec import Schedule
from server.training.trainer import learning_rate

PEAK = 3e-4


def transformers_rates(schedule: Schedule, num_warmup: int, total: int) -> list[float]:
    """Return the rate of each step from 0 to `total`."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], PEAK)
    if schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup)
    elif schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup, total)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup, total)
    rates = []
    for _ in range(total + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("total", "ratio", "num_warmup"),
    [
        (100, 0.05, 5),
        (7, 0.3, 3),
        (40, 0.0, 0),
        (1, 0.05, 1),
        (3, 1.0, 3),
        (100, 0.07, 7),
        (11, 0.1, 2),
        (1, 0, 0),
    ],
)
def test_the_schedule_is_transformers(schedule: Schedule, total: int, ratio: float, num_warmup: int) -> None:
    theirs = transformers_rates(schedule, num_warmup, total)
    for step in range(total):
        expected = theirs[step + 1] if step < num_warmup else theirs[step]
        if num_warmup == total == step + 1:
            expected = PEAK  # the end of the warm-up; transformers' decay is over before it began
        assert learning_rate(step, total, PEAK, schedule, ratio) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 13, 200])
def test_every_step_learns_and_none_more_than_the_peak(schedule: Schedule, ratio: float, total: int) -> None:
    rates = [learning_rate(step, total, PEAK, schedule, ratio) for step in range(total)]
    assert all(0 < rate <= PEAK for rate in rates)
    assert max(rates) == PEAK
    top = rates.index(PEAK)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
