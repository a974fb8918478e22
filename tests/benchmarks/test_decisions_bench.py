"""The benchmark of decisions: the peer's scores, the figures, the split, the page, and a reduced run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import command
from benchmarks.decisions import data, report
from benchmarks.decisions.__main__ import kept_outcomes, main
from benchmarks.decisions.calibration import Outcome, Quality, measure
from benchmarks.decisions.data import DataSet, Labelled, split
from benchmarks.decisions.methods import ADAPTER, LINEAR, PEFT, Scored
from benchmarks.decisions.peer import Peer
from benchmarks.decisions.report import Calibration, Speed, winner
from benchmarks.decisions.speed import NUM_QUESTIONS, OURS, Cost, Row, Work, further_shares
from benchmarks.serving.adapter_files import Sizes, write_adapter
from server.decisions.quality import Estimate
from server.decisions.questions import parse_question
from tests.benchmarks.kit import MACHINE, made

SPAM = parse_question({"type": "predicate", "instructions": "Spam?"})
OTHER = "transformers + PEFT"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_both_ways_of_the_peer_give_the_scores_of_single_rows(tiny_base_dir: Path, tmp_path: Path) -> None:
    prompts = [(5, 6, 7, 8, 9, 10), (5, 6, 7, 20), (5, 6, 7, 30, 31, 32, 33, 34)]
    options: list[list[tuple[int, ...]]] = [
        [(11, 2), (12, 13, 14, 2)],
        [(15, 2), (11, 2)],
        [(12, 2), (16, 17, 2)],
    ]
    adapter = write_adapter(tmp_path / "adapter", Sizes.read(tiny_base_dir), seed=1)
    peer = Peer(tiny_base_dir, adapter, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()

    def score(prompt: Sequence[int], option: Sequence[int]) -> float:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[range(len(option)), list(option)].sum())

    expected = [[score(prompt, one) for one in of] for prompt, of in zip(prompts, options, strict=True)]
    for found in (
        peer.whole_rows(prompts, options),
        peer.prompts_first(prompts, options),
        peer.prompts_first(prompts, options, num_shared=3),
    ):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)


def rows(num: int, sources: int) -> list[Labelled]:
    return [Labelled(f"text {n}", n % 2, f"source {n % sources}") for n in range(num)]


def test_parts_share_no_source_and_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("NUM_TRAIN", 20), ("NUM_VALIDATION", 10), ("NUM_TEST", 30)):
        monkeypatch.setattr(data, name, size)
    found = split("title", SPAM, [*rows(200, 40), Labelled("TEXT 0", 1, "another")])
    parts = (found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [20, 10, 30]
    sources = [{row.source for row in part} for part in parts]
    assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]
    texts = [row.text.casefold() for part in parts for row in part]
    assert len(set(texts)) == len(texts)
    assert found == split("title", SPAM, rows(200, 40)), "the first of equal texts counts"
    with pytest.raises(ValueError, match="too few rows"):
        split("title", SPAM, rows(200, 20))


def test_answers_are_what_training_takes() -> None:
    level = parse_question({"type": "score", "instructions": "", "levels": [{"label": "low"}, {"label": "high"}]})
    labelled = [Labelled("a", 0, "a"), Labelled("b", 1, "b")]
    assert [row["answer"] for row in DataSet("", SPAM, (), (), ()).rows(labelled)] == [True, False]
    assert [row["answer"] for row in DataSet("", level, (), (), ()).rows(labelled)] == ["low", "high"]


def test_figures_are_those_of_probabilities_and_differences_are_paired() -> None:
    labelled = [Labelled(f"text {n}", 0, f"source {n // 2}") for n in range(400)]
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    of_adapter = [wrong if n % 4 == 0 else right for n in range(400)]  # 75 % right at a confidence of 88 %
    of_other = [right if n == 0 else scores for n, scores in enumerate(of_adapter)]
    scored = {
        ADAPTER: Scored(np.array(of_adapter), 2 / np.log(3), ""),  # at this temperature the confidence is 75 %
        LINEAR: Scored(np.array(of_other), 1.0, ""),
    }
    found = measure(DataSet("", SPAM, (), (), labelled), scored)
    ours, other = found.methods[ADAPTER], found.methods[LINEAR]
    confidence = 1 / (1 + np.exp(-2))
    assert (found.num_test, found.num_sources) == (400, 200)
    assert ours.accuracy.value == 0.75
    assert ours.accuracy.high - ours.accuracy.low == pytest.approx(2 * 1.96 * np.sqrt(0.25**2 / 200), rel=0.15)
    assert ours.brier.value == pytest.approx(2 * (0.75 * (1 - confidence) ** 2 + 0.25 * confidence**2))
    assert ours.calibration_error.value == pytest.approx(confidence - 0.75)
    assert ours.calibration_error_fitted.value == pytest.approx(0, abs=1e-9)
    assert ours.brier_fitted.value == pytest.approx(2 * 0.75 * 0.25)
    assert ours.brier_change.value == pytest.approx(ours.brier_fitted.value - ours.brier.value)
    assert ours.brier_change.high < 0
    difference = other.accuracy_difference
    assert difference.value == pytest.approx(1 / 400)
    assert 0 == difference.low < difference.high < 4 / 400, "only one row differs"
    assert ours.accuracy_difference == Estimate(0.0, 0.0, 0.0)


def quality(accuracy: float, difference: float, half: float = 0.01) -> Quality:
    same = Estimate(0.5, 0.4, 0.6)
    return Quality(
        "",
        1.25,
        Estimate(accuracy, accuracy - half, accuracy + half),
        *(same,) * 6,
        Estimate(difference, difference - half, difference + half),
        same,
    )


@pytest.mark.parametrize(
    ("peft", "linear", "expected"),
    [(-0.1, -0.02, ADAPTER), (-0.1, -0.005, "can't tell"), (0.1, 0.02, PEFT), (-0.1, 0.02, LINEAR)],
)
def test_winner_needs_a_difference_beyond_chance(peft: float, linear: float, expected: str) -> None:
    methods = {ADAPTER: quality(0.8, 0.0, 0.0), PEFT: quality(0.8 + peft, peft), LINEAR: quality(0.8, linear)}
    assert winner(methods) == expected


def costs(*seconds: float) -> tuple[Cost, ...]:
    return tuple(Cost(one, 2 * one) for one in seconds)


def row(num_inputs: int, num_questions: int, ours: tuple[Cost, ...], other: tuple[Cost, ...]) -> Row:
    return Row(Work(num_inputs, num_questions, 128), {OURS: ours, OTHER: other})


ROWS = (
    row(32, 1, costs(1.0, 2.0), costs(4.0, 4.0)),
    row(1, 1, costs(0.1, 0.2), costs(0.5, 0.5)),
    row(1, NUM_QUESTIONS, costs(0.19, 0.2), costs(1.0, 1.0)),
)


def test_a_further_question_is_compared_with_the_first() -> None:
    assert further_shares(ROWS, 128) == pytest.approx([0.1, 0.0])


def test_page(tmp_path: Path) -> None:
    methods = {ADAPTER: quality(0.8, 0.0), PEFT: quality(0.7, -0.1), LINEAR: quality(0.75, -0.05)}
    outcome = Outcome("towns", "choice", 10, 320, 200, 2000, 1999, methods)
    page = tmp_path / "page.md"
    report.write(tmp_path, page)
    assert "Quality isn't measured yet." in page.read_text(encoding="utf-8")
    calibration = Calibration(made(), MACHINE, "tiny", "scikit-learn", {"towns": outcome})
    command.write(tmp_path, "calibration", calibration)
    assert kept_outcomes(tmp_path, "tiny") == {"towns": outcome}
    assert kept_outcomes(tmp_path, "another") == {}
    command.write(tmp_path, "speed", Speed(made(quick=True), MACHINE, "tiny", ROWS))
    report.write(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert "|towns|10|80.0 % (79.0 % to 81.0 %)|70.0 % (69.0 % to 71.0 %)|75.0 % (74.0 % to 76.0 %)|" in text
    assert f"|{ADAPTER}|\n" in text
    assert "|towns|adapter on decisions|1.25|0.500|0.500|+0.500 (+0.400 to +0.600)|" in text
    assert f"|{OURS}|24.0 (16.0–32.0)|7.5 (5.0–10.0)|" in text
    assert f"|{OTHER}|8.0; 3.00 × (2.00–4.00)|" in text
    assert "|time|0.050 (0.000–0.100)|" in text
    assert "A quick run" in text


@pytest.mark.slow
def test_a_reduced_run_of_the_speed(tiny_base_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    main(
        [
            *("--quick", "--parts", "speed", "--model", str(tiny_base_dir), "--home", str(home)),
            *("--threads", "1", "--out", str(tmp_path)),
        ]
    )
    folder = tmp_path / "decisions-quick"
    found = command.read(folder, "speed", Speed)
    assert found is not None
    assert [one.work.num_decisions for one in found.rows] == [2, 1, NUM_QUESTIONS]
    assert all(cost.seconds > 0 for one in found.rows for (cost,) in one.costs.values())
    assert "A quick run" in (folder / "decisions.md").read_text(encoding="utf-8")
