"""The cost of a drafted token, from steps whose times are known."""

import random

import pytest

from server.engine.cost_model import RowCosts


def seconds(num_drafted: int, share: float, step: float = 0.01) -> float:
    return step * (1 + share * num_drafted)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_slope_is_found_through_noise(share: float) -> None:
    rng, costs = random.Random(1), RowCosts(32)
    for _ in range(400):
        num_drafted = rng.choice((0, 0, 3, 8, 15))
        costs.observe(1, num_drafted, seconds(num_drafted, share) * rng.uniform(0.9, 1.1))
    assert costs.of(1) == pytest.approx(share, rel=0.25)


def test_a_new_machine_or_a_slower_one_is_learnt_within_a_few_hundred_steps() -> None:
    rng, costs = random.Random(2), RowCosts(32)
    for share, step in ((0.05, 0.01), (0.3, 0.03), (0.05, 0.008)):
        for _ in range(600):
            num_drafted = rng.choice((0, 2, 8))
            costs.observe(1, num_drafted, seconds(num_drafted, share, step))
        assert costs.of(1) == pytest.approx(share, rel=0.1)


def test_steps_that_others_held_up_hardly_count() -> None:
    rng, costs = random.Random(3), RowCosts(32)
    for number in range(400):
        num_drafted = rng.choice((0, 4, 8))
        held_up = number % 50 == 49
        costs.observe(1, num_drafted, seconds(num_drafted, 0.1) * (100 if held_up else 1))
    assert costs.of(1) == pytest.approx(0.1, rel=0.5)


def test_what_nobody_measures_any_more_goes_back_to_what_is_assumed() -> None:
    costs = RowCosts(32)
    assumed = costs.of(1)
    for number in range(200):
        costs.observe(1, number % 2 * 8, seconds(number % 2 * 8, 0.6))
    assert costs.of(1) > 0.5
    for _ in range(1000):
        costs.observe(1, 0, 0.01)
    assert costs.of(1) == pytest.approx(assumed, rel=0.1)


def test_numbers_of_sequences_are_told_apart() -> None:
    costs = RowCosts(32)
    for number in range(200):
        costs.observe(1, number % 2 * 8, seconds(number % 2 * 8, 0.05))
        costs.observe(8, number % 2 * 8, seconds(number % 2 * 8, 0.4))
    assert costs.of(1) == pytest.approx(0.05, rel=0.1)
    assert costs.of(8) == costs.of(5) == pytest.approx(0.4, rel=0.1)
    assert costs.of(32) < costs.of(16) == costs.of(9)


def test_a_clock_that_stands_still_says_nothing() -> None:
    costs = RowCosts(32)
    for number in range(50):
        costs.observe(1, number % 3, 0.0)
    assert costs.of(1) == RowCosts(32).of(1)


def test_whatever_was_measured_the_cost_is_a_share_above_zero() -> None:
    rng, costs = random.Random(4), RowCosts(32)
    for _ in range(2000):
        num_drafted = rng.choice((0, 0, 1, 15))
        costs.observe(1, num_drafted, rng.choice((1e-6, 0.01, 10.0)) / (1 + num_drafted))
        assert 0 < costs.of(1) < 100
