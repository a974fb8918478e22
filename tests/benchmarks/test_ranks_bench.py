"""The comparison of rules for alpha and σ: its rows, its tables, and a reduced run on a tiny base."""

import math
from pathlib import Path

from benchmarks import ranks
from benchmarks.ranks import DEFAULT, RATE, Outcome, Results, Trial, markdown
from benchmarks.training.tasks import arithmetic
from tests.benchmarks.kit import MACHINE, made


def test_a_problem_is_right_and_in_one_part_only(tmp_path: Path) -> None:
    task = arithmetic(tmp_path, print)
    parts = [{row.prompt for row in part} for part in (task.train, task.validation, task.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 7300
    for row in task.test:
        left, operation, right, _ = row.prompt.split()
        assert int(row.completion) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation](
            int(left), int(right)
        )


def outcome(rank: int, rate: float, loss: float, peak: float = 4.0, seed: int = 0) -> Outcome:
    return Outcome(Trial("numbers", DEFAULT, rank, rate, seed, 320, 160, 3), loss, 4.0, peak)


def test_ranks_that_the_default_rate_does_not_suit_are_bold() -> None:
    found = [
        *(outcome(4, RATE, 1.05), outcome(4, RATE / 2, 1.0), outcome(4, 2 * RATE, math.nan)),
        *(outcome(16, RATE, 1.2), outcome(16, RATE / 2, 1.0)),
        *(outcome(64, RATE, 1.0, peak=9.0), outcome(64, RATE / 2, 1.1)),
        *(outcome(2, RATE, loss, seed=seed) for seed, loss in enumerate((0.9, 1.0, 1.1))),
        *(outcome(2, RATE / 2, loss, seed=seed) for seed, loss in enumerate((0.7, 1.1, 1.05))),
    ]
    text = markdown(Results(made(), MACHINE, "tiny", found))
    assert (
        "|numbers, 120 steps on 320 rows|1.000, 5%, 0.0005|1.050, 5%, 0.0005|**1.200, 20%, 0.0005**|"
        "**1.000, 0%, 0.001**|"
    ) in text
    assert "|numbers, 120 steps on 320 rows|1.000 (0.900–1.100)|" in text


def test_a_reduced_run_is_kept(tmp_path: Path, tiny_base_dir: Path) -> None:
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    results = ranks.main(["--quick", "--threads", "1", *places])
    assert [(one.trial.rank, one.trial.seed) for one in results.outcomes] == [(2, 0), (2, 1), (2, 2)]
    assert all(0 < one.loss < 10 for one in results.outcomes)
    kept = sorted((tmp_path / "out" / "ranks-quick").iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    assert ranks.main(["--quick", "--threads", "1", *places]).outcomes == results.outcomes
    assert [file.stat().st_mtime_ns for file in kept] == times
