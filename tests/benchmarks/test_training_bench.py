"""The arithmetic of the training benchmarks, and one reduced run of the speed benchmark on a tiny base."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train
from benchmarks.training import train_and_serve_report, train_report
from benchmarks.training.peer import COMPILED, EAGER, IGNORED, PACKED, load, packed, padded
from benchmarks.training.rate_search import best_rate
from benchmarks.training.runs import NATIVE, TORCH, Measured
from benchmarks.training.train_report import Row
from benchmarks.training.works import WORKS
from tests.benchmarks.kit import MACHINE, figures, made

CPU = torch.device("cpu")


ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34]]


def test_packed_rows_do_not_attend_to_each_other(tiny_base_dir: Path) -> None:
    """Loss and gradients of the packing peer equal the padding peer's; attention across rows would show."""
    model = load(tiny_base_dir, "full", torch.float32)

    def loss_and_gradient(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        gradient = model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad
        assert gradient is not None
        return loss.detach(), gradient.clone()

    together, alone = dict(packed(ROWS)), dict(padded(ROWS, 7))
    for found, expected in zip(loss_and_gradient(together), loss_and_gradient(alone), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    joined = together | {"position_ids": torch.arange(15)[None]}
    assert abs(loss_and_gradient(joined)[0] - loss_and_gradient(alone)[0]) > 1e-3
    longer, _ = loss_and_gradient(dict(padded(ROWS, 12)))
    torch.testing.assert_close(longer, loss_and_gradient(alone)[0], atol=1e-5, rtol=1e-5)


def test_inputs_of_the_peers() -> None:
    found = padded(ROWS[:2], 7)
    assert found["labels"][1].tolist() == [20, 21, 22, *[IGNORED] * 4]
    assert found["attention_mask"].sum() == 10
    assert "attention_mask" not in padded([[1, 2], [3, 4]], 2)
    found = packed(ROWS[:2])
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 20, 21, 22]]
    assert found["labels"][0].tolist() == [IGNORED, 6, 7, 8, 9, 10, 11, IGNORED, 21, 22]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]


def measured(speed: float, memory: int) -> Measured:
    return Measured(speed, memory, 3.0, 1.0, native=True)


def trained(rows: list[Row], *, quick: bool = False) -> train_report.Results:
    return train_report.Results(made(quick=quick), MACHINE, "tiny", 2, rows)


def test_the_speed_targets() -> None:
    work = next(work for work in WORKS if work.most_memory is not None)
    row = Row(
        work,
        {
            NATIVE: (measured(260, 2), measured(240, 2)),
            TORCH: (measured(150, 2), measured(150, 2)),
            EAGER: (measured(150, 4), measured(120, 4)),
            COMPILED: (measured(200, 5), measured(100, 5)),
        },
    )
    speed, memory = train_report.evaluate(trained([row]))
    assert (speed.wanted, speed.measured) == ("≥ 2.4 × peer, compiled", "1.85 (1.30–2.40)")
    assert speed.reached is False
    assert (memory.measured, memory.reached) == ("0.40", False)
    assert [target.reached for target in train_report.evaluate(trained([row], quick=True))] == [None, None]
    text = train_report.markdown(trained([row]))
    assert "|LoRA, 4 × 512 tokens|250 (240–260)|150|135 (120–150)|–|150 (100–200)|" in text
    assert "It pads short rows" in text
    assert "native code wasn't available" not in text
    assert "bf16 adapters, the fused AdamW" in text
    assert "compute in" not in text
    text = train_report.markdown(replace(trained([row]), torch_dtype="fp32"))
    assert "fp32 adapters, the fused AdamW" in text
    assert "The peer, and smolora in torch, compute in fp32" in text


def test_every_work_has_a_target_against_the_compiled_peer() -> None:
    assert {work.key: work.speeds for work in WORKS} == {
        "8x128": {COMPILED: 2.2},
        "4x512": {COMPILED: 2.4},
        "full": {COMPILED: 1.8},
        "short": {EAGER: 4.0, PACKED: 2.5, COMPILED: 3.0},
    }
    assert all(set(work.speeds) < set(work.sides) for work in WORKS)
    assert [work.key for work in WORKS if TORCH not in work.sides] == [], "full is torch's; LoRA shows both"


def test_best_rate_is_inside_its_grid() -> None:
    asked: list[float] = []

    def loss_at(rate: float, best: float) -> float:
        asked.append(rate)
        return (math.log2(rate) - math.log2(best)) ** 2

    found, losses = best_rate(1.0, lambda rate: loss_at(rate, 1.2))
    assert (found, sorted(losses)) == (1.0, [0.5, 1.0, 2.0])
    found, losses = best_rate(1.0, lambda rate: loss_at(rate, 8.0))
    assert (found, sorted(losses)) == (8.0, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    found, losses = best_rate(1.0, lambda rate: loss_at(rate, 0.2))
    assert (found, sorted(losses)) == (0.25, [0.125, 0.25, 0.5, 1.0, 2.0])
    assert len(asked) == 3 + 6 + 5, "no rate twice"


def test_diverging_rate_is_the_worst() -> None:
    found, losses = best_rate(1.0, lambda rate: math.nan if rate > 0.3 else 1 / rate)
    assert (found, losses[0.5], losses[0.125]) == (0.25, math.inf, 8.0)
    with pytest.raises(RuntimeError, match="no best learning rate from 1 to 64"):
        best_rate(2.0, lambda rate: 1 / rate, most=7)


def test_targets_of_training_while_serving() -> None:
    rounds = tuple(
        train_and_serve_report.Round(figures(300.0), figures(200.0), alone, beside)
        for alone, beside in ((500.0, 110.0), (500.0, 100.0), (500.0, 120.0))
    )
    results = train_and_serve_report.Results(made(), MACHINE, "work", rounds)
    speed, gaps = train_and_serve_report.evaluate(results)
    assert (speed.measured, speed.reached) == ("0.22 (0.20–0.24)", True)
    assert (gaps.wanted, gaps.reached) == ("≤ 1.5 × without it", True)
    text = train_and_serve_report.markdown(results)
    assert "|the job's tokens/s|500|110 (100–120)|0.22 × (0.20–0.24)|" in text


@pytest.mark.slow
def test_reduced_run(tmp_path: Path, tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(out)]
    (row,) = train.main(["--quick", "--only", "short", "--threads", "1", *places]).rows
    assert list(row.figures) == [NATIVE, EAGER, PACKED], "compiling takes a minute"
    losses = [one.loss for found in row.figures.values() for one in found]
    assert max(losses) == pytest.approx(min(losses), rel=0.005), "the same rows, before any step"
    assert min(one.peak_rss for found in row.figures.values() for one in found) > 100e6
    assert all(one.keeps_memory for found in row.figures.values() for one in found), "the peers, too"
    document = json.loads((out / "train.json").read_text())
    assert document["rows"][0]["work"]["key"] == "short"
    assert "measures nothing" not in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["train.json"]
