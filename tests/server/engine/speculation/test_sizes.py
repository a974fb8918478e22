"""Draft sizes against all possible choices, and acceptance by correct guesses."""

import itertools
import random

import pytest

from server.engine.speculation import Acceptance, draft_sizes


def rate(num_decoding: int, chances: list[list[float]], cost: float, sizes: tuple[int, ...]) -> float:
    """Return the tokens of a step per time."""
    tokens = sum(sum(of_guess[:size]) for of_guess, size in zip(chances, sizes, strict=True))
    return (num_decoding + tokens) / (1 + cost * sum(sizes))


def test_draft_sizes_maximize_the_throughput() -> None:
    drafted = set()
    for seed in range(200):
        rng = random.Random(seed)
        chances = [
            list(itertools.accumulate(rng.choices((0.1, 0.5, 0.9), k=3), lambda a, b: a * b)) for _ in range(3)
        ]
        num_decoding, cost = rng.randint(3, 6), rng.choice((0.01, 0.05, 0.1, 0.2))
        found = draft_sizes(num_decoding, chances, cost, 9)
        best = max(
            itertools.product(range(4), repeat=3), key=lambda sizes: rate(num_decoding, chances, cost, sizes)
        )
        assert rate(num_decoding, chances, cost, tuple(found)) == pytest.approx(
            rate(num_decoding, chances, cost, best)
        )
        drafted.add(sum(found))
    assert {0, 9} < drafted


def test_the_likeliest_guesses_are_drafted_first() -> None:
    chances = [[0.9, 0.3], [0.8, 0.7], [0.2, 0.1]]
    assert [draft_sizes(3, chances, 0.01, num) for num in range(5)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 2, 0],
        [2, 2, 0],
    ]


def test_acceptance_follows_correct_guesses() -> None:
    acceptance = Acceptance()
    (before,) = acceptance.chances(2, 1)
    for _ in range(40):
        acceptance.observe(2, True)
    (often,) = acceptance.chances(2, 1)
    for _ in range(40):
        acceptance.observe(2, False)
    (seldom,) = acceptance.chances(2, 1)
    assert seldom < 0.05 < before < 0.95 < often


def test_each_guessed_token_lengthens_the_match() -> None:
    """Therefore the chances of a guess depend on the outcomes of longer matches, but not of shorter ones."""
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe(9, True)
        acceptance.observe(3, False)
    two, three = acceptance.chances(2, 2)
    assert three < 0.05 < two
    assert list(acceptance.chances(8, 3)) == pytest.approx([1.0] * 3, abs=0.05)
