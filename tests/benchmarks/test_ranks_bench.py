"""The comparison of rules for alpha and σ: its rows, its tables, and a reduced run on a tiny base."""

import math
from pathlib import Path

import pytest

from benchmarks import ranks
from benchmarks.ranks import DEFAULT, RATE, Outcome, Results, Trial, markdown
from benchmarks.training.tasks import numbers, words
from tests.benchmarks.kit import MACHINE, made


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (7, "seven"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (9012, "nine thousand twelve"),
        (1234, "one thousand two hundred thirty-four"),
    ],
)
def test_numbers_in_words(number: int, expected: str) -> None:
    assert " ".join(words(number)) == expected


def test_no_number_is_trained_on_and_held_out(tmp_path: Path) -> None:
    rows = numbers(400, tmp_path, print)
    assert len({row.prompt for row in rows}) == 400


def outcome(rank: int, rate: float, loss: float, peak: float = 4.0, seed: int = 0) -> Outcome:
    return Outcome(Trial("numbers", DEFAULT, rank, rate, seed, 320, 160, 3), loss, 4.0, peak)


def test_ranks_that_the_default_rate_does_not_suit_are_bold() -> None:
    found = [
        *(outcome(4, RATE, 1.05), outcome(4, RATE / 2, 1.0), outcome(4, 2 * RATE, math.nan)),
        *(outcome(16, RATE, 1.2), outcome(16, RATE / 2, 1.0)),
        *(outcome(64, RATE, 1.0, peak=9.0), outcome(64, RATE / 2, 1.1)),
        *(outcome(2, RATE, loss, seed=seed) for seed, loss in enumerate((0.9, 1.0, 1.1))),
    ]
    text = markdown(Results(made(), MACHINE, "tiny", found))
    assert "|numbers, 120 steps|1.050, 5%, 0.0005|**1.200, 20%, 0.0005**|**1.000, 0%, 0.001**|" in text
    assert "|numbers, 120 steps|1.000 (0.900–1.100)|" in text
    assert "320 rows, 8 a step; loss on 160 other rows" in text


def test_a_reduced_run_is_kept(tmp_path: Path, tiny_base_dir: Path) -> None:
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    results = ranks.main(["--quick", "--threads", "1", *places])
    assert [(one.trial.rank, one.trial.seed) for one in results.outcomes] == [(2, 0), (2, 1), (2, 2)]
    assert all(0 < one.loss < 10 for one in results.outcomes)
    kept = sorted((tmp_path / "out" / "ranks-quick").iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    assert ranks.main(["--quick", "--threads", "1", *places]).outcomes == results.outcomes
    assert [file.stat().st_mtime_ns for file in kept] == times
