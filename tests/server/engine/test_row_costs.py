"""The cost of an extra token, learnt from steps with known times."""

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


def test_a_changed_speed_is_learnt_within_a_few_hundred_steps() -> None:
    rng, costs = random.Random(2), RowCosts(32)
    for share, step in ((0.05, 0.01), (0.3, 0.03), (0.05, 0.008)):
        for _ in range(600):
            num_drafted = rng.choice((0, 2, 8))
            costs.observe(1, num_drafted, seconds(num_drafted, share, step))
        assert costs.of(1) == pytest.approx(share, rel=0.1)


def test_delayed_steps_hardly_count() -> None:
    rng, costs = random.Random(3), RowCosts(32)
    for number in range(400):
        num_drafted = rng.choice((0, 4, 8))
        held_up = number % 50 == 49
        costs.observe(1, num_drafted, seconds(num_drafted, 0.1) * (100 if held_up else 1))
    assert costs.of(1) == pytest.approx(0.1, rel=0.5)


def test_without_measurements_the_cost_returns_to_the_assumption() -> None:
    costs = RowCosts(32)
    assumed = costs.of(1)
    for number in range(200):
        costs.observe(1, number % 2 * 8, seconds(number % 2 * 8, 0.6))
    assert costs.of(1) > 0.5
    for _ in range(1000):
        costs.observe(1, 0, 0.01)
    assert costs.of(1) == pytest.approx(assumed, rel=0.1)


def test_numbers_of_sequences_have_their_own_costs() -> None:
    costs = RowCosts(32)
    for number in range(200):
        costs.observe(1, number % 2 * 8, seconds(number % 2 * 8, 0.05))
        costs.observe(8, number % 2 * 8, seconds(number % 2 * 8, 0.4))
    assert costs.of(1) == pytest.approx(0.05, rel=0.1)
    assert costs.of(8) == costs.of(5) == pytest.approx(0.4, rel=0.1)
    assert costs.of(32) < costs.of(16) == costs.of(9)


def test_a_stopped_clock_changes_nothing() -> None:
    costs = RowCosts(32)
    for number in range(50):
        costs.observe(1, number % 3, 0.0)
    assert costs.of(1) == RowCosts(32).of(1)


def test_the_cost_is_always_a_positive_share() -> None:
    rng, costs = random.Random(4), RowCosts(32)
    for _ in range(2000):
        num_drafted = rng.choice((0, 0, 1, 15))
        costs.observe(1, num_drafted, rng.choice((1e-6, 0.01, 10.0)) / (1 + num_drafted))
        assert 0 < costs.of(1) < 100
