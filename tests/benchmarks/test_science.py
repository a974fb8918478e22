"""The comparison with full fine-tuning: its statistics, its measurements, and a reduced run on a tiny base."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import command
from benchmarks.science import __main__ as science
from benchmarks.science.plan import Results
from benchmarks.science.statistics import Difference, difference, verdicts
from benchmarks.science.trial import Description, Outcome, Trial, measure
from server.model.base.weights import BaseModel
from server.training.encoding import Example
from server.training.evaluate import evaluate
from server.training.trainables import TrainableModel


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
