"""The comparison with full fine-tuning: its statistics, its measurements, and a reduced run on a tiny base."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks import command
from benchmarks.science import __main__ as science
from benchmarks.science import report
from benchmarks.science.plan import RANKS, TEST_SEEDS, Results, rounded, untrained
from benchmarks.science.statistics import Difference, difference, verdicts
from benchmarks.science.trial import Description, Outcome, Trial, measure
from server.model.base.weights import BaseModel
from server.training.encoding import Example
from server.training.evaluate import evaluate
from server.training.trainables import TrainableModel
from tests.benchmarks.kit import MACHINE


def test_interval_of_a_difference_counts_tokens() -> None:
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)
    same = difference(0.5 * counts.repeat(5, 1), counts, margin=0.6)
    assert (same.mean, same.low, same.high) == pytest.approx((0.5, 0.5, 0.5))
    assert same.p_above_margin == same.p_below_zero == 1 / 10_001


def test_interval_has_the_width_of_both_seeds_and_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    num_seeds, num_rows = 5, 400
    of_seeds = torch.randn(num_seeds, 1, generator=generator, dtype=torch.float64)
    of_rows = 10 * torch.randn(1, num_rows, generator=generator, dtype=torch.float64)
    found = difference(of_seeds + of_rows, torch.ones(num_rows, dtype=torch.float64), margin=1.0)
    spread = (of_seeds.var(correction=0) / num_seeds + of_rows.var(correction=0) / num_rows).sqrt().item()
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert found.mean == pytest.approx((of_seeds.mean() + of_rows.mean()).item())


def compared(p_above_margin: float, p_below_zero: float) -> Difference:
    return Difference(0.0, 0.0, 0.0, 0.0, p_above_margin, p_below_zero)


def test_verdicts_are_corrected_for_their_number() -> None:
    found = [compared(0.007, 0.9), compared(0.012, 0.9), compared(0.03, 0.001), compared(0.5, 0.5)]
    assert verdicts(found) == ["can't tell", "can't tell", "worse", "can't tell"]  # 0.007 > 0.025 / 4
    found[0] = replace(found[0], p_above_margin=0.006)
    found[1] = replace(found[1], p_above_margin=0.008)
    assert verdicts(found) == ["no worse", "no worse", "worse", "can't tell"]
    assert verdicts([compared(0.01, 0.01)]) == ["no worse"]  # a real difference that doesn't matter


def test_measured_rows_leave_out_the_end(tiny_base: BaseModel) -> None:
    passes = TrainableModel(tiny_base, max_length=16).passes
    examples = [
        Example((5, 6, 7, 8), (False, False, True, True)),
        Example((9, 3, 4, 5, 6), (False, True, True, True, True)),
    ]
    whole = measure(passes, examples)
    assert whole.num_tokens == [1, 3]
    for example, loss, count in zip(examples, whole.losses, whole.num_tokens, strict=True):
        before_end = replace(example, is_target=(*example.is_target[:-1], False))
        assert loss == pytest.approx(evaluate(passes, [before_end]).loss * count, rel=1e-5)


def of_rank_8(*losses: tuple[float, int, float]) -> Results:
    described = Description("sums", "exact match", 1, (1, 1, 1), 1, (1,))
    outcomes = [
        Outcome(Trial("arithmetic", 8, rate, seed), 1, 1, loss, 0.0, 0.0, 1.0, 1.0) for rate, seed, loss in losses
    ]
    return Results("arithmetic", described, (), 0.0, tuple(outcomes))


def test_best_rate_needs_both_seeds_and_neighbours() -> None:
    both = [(rate, seed, loss) for rate, loss in ((1.0, 3.0), (2.0, 1.0), (4.0, 2.0)) for seed in (0, 1)]
    assert of_rank_8(*both, (8.0, 0, 0.1)).best(8) == 2.0  # 8.0 has one seed
    assert of_rank_8(*both[2:]).best(8) is None
    assert of_rank_8(*both).best(16) is None


@pytest.mark.thorough
def test_a_reduced_run_resumes_and_repeats(
    tmp_path: Path, tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--quick",
        "--model",
        str(tiny_base_dir),
        "--home",
        str(tmp_path / "home"),
        "--out",
        str(tmp_path),
    ]
    arguments += ["--cache", str(tmp_path), "--tasks", "arithmetic", "--parts", "quality", "defaults"]
    science.main(arguments)
    folder = tmp_path / "science-quick"
    kept = (folder / "arithmetic.json").read_bytes()
    page = (folder / "science.md").read_text(encoding="utf-8")
    assert "can't tell" in page or "no worse" in page
    science.main(arguments)
    assert (folder / "arithmetic.json").read_bytes() == kept
    results = command.read(folder, "arithmetic", Results)
    assert results is not None
    key = results.outcomes[-1].trial.key
    with pytest.raises(SystemExit, match="0"):
        science.main([*arguments, "--again", key])
    with pytest.raises(SystemExit, match="no kept run is named 'r=3'"):
        science.main([*arguments, "--again", "r=3"])


def results_of(task: str, worse_by: dict[int, float]) -> Results:
    """Return a task of 40 rows, where a method's loss is 1 nat a row, and what `worse_by` has more."""
    described = Description(f"the task {task}", "exact match", 1, (100, 10, 40), 1000, (1,) * 40)
    outcomes = [Outcome(untrained(task), 0, 9, 4.0, 0.0, 0.1, 2.0, 1.5)]
    for rank in (0, *RANKS):
        best = 1e-3 if rank else 1e-4
        for power, loss in ((-1, 1.3), (-0.5, 1.05), (0, 1.0), (0.5, 1.2)):
            for seed in (0, 1):
                trial = Trial(task, rank, rounded(best * 2**power), seed)
                outcomes.append(Outcome(trial, 10, 9, loss, 0.5, 0.5, 2.5, 1.75))
        for seed in TEST_SEEDS:
            trial = Trial(task, rank, best, seed, is_test=True)
            losses = tuple(1 + worse_by[rank] + 0.001 * (row % 2) for row in range(40))
            outcomes.append(Outcome(trial, 10, 9, fmean(losses), 0.5, 0.75, 2.5, 1.75, losses, "01" * 20))
    return Results(task, described, (MACHINE,), 1.5, tuple(outcomes))


def test_page_has_verdicts_and_names_what_is_missing(tmp_path: Path) -> None:
    command.write(tmp_path, "words", results_of("words", {0: 0.0, 8: 0.3, 16: 0.01, 32: -0.1}))
    command.write(tmp_path, "arithmetic", results_of("arithmetic", dict.fromkeys((0, *RANKS), 0.0)))
    report.write(tmp_path, tmp_path / "science.md")
    page = (tmp_path / "science.md").read_text(encoding="utf-8")
    assert "Tasks that aren't measured to the end yet: sentiment, topic, pronunciation, facts." in page
    assert "|the task words, exact match|0.000|0.500 ± 0.000|0.500 ± 0.000|0.500 ± 0.000|0.500 ± 0.000|" in page
    assert "|words|8|+0.3000 (+0.3000 to +0.3000)|worse|+0.0 (+0.0 to +0.0)|no worse|" in page
    assert "|words|16|+0.0100 (+0.0100 to +0.0100)|no worse|" in page, "it is worse, but by less than 2 %"
    assert "By loss: no worse 5 of 6, worse 1 of 6, can't tell 0 of 6." in page
    assert "|words|0.0001 (7.1e-05–0.0001)|0.001 (0.00071–0.001)|" in page
    assert "|words, answers|+0.250|+0.250|+0.250|+0.250|" in page
    assert "10 (10–10) times at rank 16" in page
    assert "## Costs" not in page
    assert (tmp_path / "science-rates.png").read_bytes().startswith(b"\x89PNG")
    assert report.summary(tmp_path) is None
