"""The arithmetic of the training benchmarks, and one reduced run of the speed benchmark on a tiny base."""

import io
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import methods, train
from benchmarks.training import adapters_report, methods_report, train_and_serve_report, train_report
from benchmarks.training.adapters_report import SetSize
from benchmarks.training.methods_report import Compared
from benchmarks.training.methods_run import Outcome, Place, Trial, outcome_of
from benchmarks.training.peer import COMPILED, EAGER, IGNORED, PACKED, load, packed, padded
from benchmarks.training.rate_search import best_rate
from benchmarks.training.ratings import FILES, NESTED, PACKAGE, Rated, read_sets, rule_classifier
from benchmarks.training.runs import NATIVE, TORCH, Measured
from benchmarks.training.sentiment import LABELS, Score, blend, classify, examples_of, prompt_of, score
from benchmarks.training.train_report import Row
from benchmarks.training.works import WORKS
from server.errors import StartupError
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.smollm import NoAdapters, SmolLM
from server.training.trained_rows import TrainedRows
from tests.benchmarks.kit import MACHINE, figures, made
from tests.kits.engines import random_adapter

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a source distribution like the package's: each set has 40 documents of 3 sentences, and some
    oddities."""
    lines = [
        f"{document}_{place}\t{1.5 if place % 2 else -1.5}\tSentence {place} of {document}."
        for document in range(40)
        for place in range(3)
    ]
    lines += [
        "41_0\t0.4\tNeither.",
        "42_0\t-2\tsentence 0 of 1.",
        "",
        '43_0\t-0.5\tIt "just" counts.',
        "44_0\t3\t ",
    ]
    place = tmp_path / NESTED
    place.parent.mkdir()
    with tarfile.open(place, "w:gz") as archive:
        for file in FILES.values():
            member = tarfile.TarInfo(f"somewhere/{file}")
            data = "\r\n".join(lines).encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / f"{PACKAGE}.py").write_text(
        "class SentimentIntensityAnalyzer:\n"
        "    def polarity_scores(self, text):\n"
        "        return {'compound': 0.5 if 'good' in text else -0.5}\n"
    )
    return tmp_path


def test_rating_sets_are_clear_distinct_and_split_by_document(source: Path) -> None:
    sets = read_sets(source, num_train=1000, num_tuning=10, num_test=1000)
    assert [one.name for one in sets] == ["tweets", "movies", "products", "news"]
    for one in sets:
        sentences = [*one.train, *one.tuning, *one.test]
        assert len(sentences) == 121, "one is neutral, one a repetition, one empty"
        assert Rated('It "just" counts.', False) in sentences
        assert len(one.tuning) == 10
        documents = [
            {s.text.rpartition(" ")[2] for s in part if s.text.startswith("Sentence")}
            for part in ((*one.train, *one.tuning), one.test)
        ]
        assert not documents[0] & documents[1]
        assert 20 <= len(one.test) <= 60
    assert sets == read_sets(source, num_train=1000, num_tuning=10, num_test=1000)
    capped = read_sets(source, num_train=5, num_tuning=2, num_test=4)[0]
    assert (len(capped.train), len(capped.tuning), len(capped.test)) == (5, 2, 4)


def test_rule_classifier_is_the_packages(source: Path) -> None:
    rules = rule_classifier(source)
    assert rules.polarity_scores("a good day")["compound"] > 0 > rules.polarity_scores("rain")["compound"]


def test_scores() -> None:
    sentences = [Rated("", True), Rated("", True), Rated("", True), Rated("", False)]
    found = score([True, True, False, False], sentences)
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert score([True] * 4, sentences).macro_f1 == pytest.approx((6 / 7 + 0) / 2)


def test_blend_is_the_weighted_sum_of_adapters(tiny_base: BaseModel) -> None:
    shape = tiny_base.config.shape
    parts = [random_adapter(shape, 0, rank=4), random_adapter(shape, 1, rank=2, modules=["q_proj", "up_proj"])]
    whole = TrainedRows(blend(parts, 0.3), shape, torch.float32, CPU)
    alone = [TrainedRows(part, shape, torch.float32, CPU) for part in parts]
    x = torch.randn(5, shape.features["q_proj"][1])
    with torch.no_grad():
        for group, modules in (("qkv", ("q_proj", "k_proj", "v_proj")), ("gate_up", ("gate_proj", "up_proj"))):
            zero = torch.zeros(5, sum(shape.features[module][0] for module in modules))
            expected = 0.3 * sum(rows.add(1, group, x, zero.clone()) for rows in alone)
            torch.testing.assert_close(whole.add(1, group, x, zero.clone()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.real
def test_the_label_is_the_likelier_completion(real_base: BaseModel) -> None:
    """Compared with the loss of each label as a completion, on sentences about which the base is certain."""
    sentences = [Rated("I love it, it is wonderful!", True), Rated("Terrible, awful, I hate it.", False)]
    model = SmolLM(real_base.config, real_base.weights, max_positions=64)
    found = classify(real_base, model, NoAdapters(), sentences)
    for answer, sentence in zip(found, sentences, strict=True):
        losses = []
        for label in LABELS:
            ids = torch.tensor(real_base.tokenizer.encode(prompt_of(sentence) + label))
            prompt = len(real_base.tokenizer.encode(prompt_of(sentence)))
            from server.training.passes import PackedAttention

            attention = PackedAttention([len(ids)], CPU)
            with torch.no_grad():
                log_probs = model.logits(model.forward(ids, attention.positions, attention, NoAdapters()))
            losses.append(-float(log_probs.log_softmax(-1)[prompt - 1, ids[prompt]]))
        assert answer == (losses[1] < losses[0])
    (example, _) = examples_of(real_base, sentences)
    assert sum(example.is_target) == 2, "the label and the end token"


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


def outcome(rank: int, seed: int, loss: float, accuracy: float, speed: float = 400.0) -> Outcome:
    trial = Trial(rank, 1e-3, seed, 2400, 0, 1000)
    by = "native code" if rank else "torch"
    return Outcome(trial, 1000 * (rank or 100), 0.5, 10**9, 10**7, 10.0, speed, math.nan, loss, accuracy, by)


def test_methods_are_compared_with_intervals() -> None:
    full = Compared(0, 5e-5, {5e-5: 0.3}, tuple(outcome(0, s, 0.30, 0.88 + s / 100, 200.0) for s in (1, 2, 3)))
    near = Compared(8, 1e-3, {5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.6}, tuple(outcome(8, s, 0.35, 0.9) for s in (1, 2, 3)))
    results = methods_report.Results(
        made(),
        MACHINE,
        "tiny",
        "movies",
        (2400, 250, 1000),
        [full, near],
        outcome(16, 1, math.nan, math.nan, 300.0),
    )
    text = methods_report.markdown(results)
    row = "|LoRA, r=8|8,000 (50.0%)|1.00 GB|10 MB|10 s|400|0.3500 ± 0.0000|0.900 ± 0.000|"
    assert row in text
    assert "2,400 sentences of movies, once, in 300 steps of 8 rows" in text
    assert "Learning rates: full fine-tuning 5e-05, LoRA, r=8 0.001." in text
    assert "held-out loss: the best LoRA (LoRA, r=8: 0.3500 ± 0.0000) is not better than full (0.3000" in text
    # 0.90 ± 0.025: the same mean doesn't differ significantly from it
    assert "held-out accuracy: the best LoRA (LoRA, r=8: 0.9000 ± 0.0000) doesn't differ significantly" in text
    assert "One standard error of 1,000 sentences is 0.9 points of accuracy" in text
    assert (
        "LoRA, r=8 (by native code) trains 2.00 × as many tokens a second as full fine-tuning (by torch)" in text
    )
    assert "LoRA, r=16 by torch: 1.50 ×." in text


def test_accuracies_have_their_standard_errors() -> None:
    sizes = {"tweets": SetSize(500, 250)}
    names = [adapters_report.BASE, "tweets", adapters_report.BLEND, adapters_report.FULL, adapters_report.RULES]
    scores = {
        name: {"tweets": Score(accuracy, 0.8)}
        for name, accuracy in zip(names, (0.80, 0.90, 0.85, 0.8, 0.93), strict=True)
    }
    results = adapters_report.Results(made(), MACHINE, "tiny", "as it is", sizes, scores, {})
    text = adapters_report.markdown(results)
    assert "|base|0.800 ± 0.025|" in text
    assert "|rules (vaderSentiment)|**0.930 ± 0.016**|" in text
    assert "tweets: 0.900, beats the base (0.800), **does not beat** the rules (0.930, by less than two" in text
    assert "One standard error is 1.6 to 2.5 points" in text


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


def test_rates_are_chosen_on_tuning_rows() -> None:
    """The rate is chosen by one seed's loss on the tuning rows; other seeds are tested."""
    asked: list[Trial] = []
    best = {0: 1e-4, 8: 5e-4, 16: 2.5e-4, 32: 2e-3}

    def run(trial: Trial) -> Outcome:
        asked.append(trial)
        loss = abs(math.log2(trial.learning_rate / best[trial.rank]))
        return replace(outcome(trial.rank, trial.seed, loss, 0.9), trial=trial, tuning_loss=loss)

    compared, in_torch = methods.compare(run, (2400, 250, 1000), num_seeds=3)
    assert {one.rank: one.rate for one in compared} == pytest.approx(best)
    for one in compared:
        rates = list(one.losses)
        assert rates[0] < one.rate < rates[-1], "no optimum on the edge"
        tried = [trial for trial in asked if trial.rank == one.rank and trial.native]
        tuned, tested = tried[: len(rates)], tried[len(rates) :]
        assert {(trial.seed, trial.num_tuning, trial.num_test) for trial in tuned} == {(0, 250, 0)}
        assert [(trial.seed, trial.num_tuning, trial.num_test) for trial in tested] == [
            (s, 0, 1000) for s in (1, 2, 3)
        ]
        assert {trial.learning_rate for trial in tested} == {one.rate}
        assert tuple(found.trial for found in one.outcomes) == tuple(tested)
    assert (in_torch.trial.rank, in_torch.trial.native, in_torch.trial.learning_rate) == (16, False, 2.5e-4)


@pytest.mark.thorough
def test_runs_are_stored_by_their_inputs(tmp_path: Path, source: Path, tiny_base_dir: Path) -> None:
    base = resolve_base(str(tiny_base_dir), tmp_path / "home")
    kept = tmp_path / "kept"
    kept.mkdir()
    place = Place(base, load_base(base).digest, source, "movies", 1, tmp_path / "native", kept)
    trial = Trial(4, 1e-3, 1, 16, 8, 0)
    found, before = outcome_of(trial, place)
    assert not before
    assert (found.num_trainable, found.computed_by) == (11_136, "torch")  # 3 layers · rank 4 · (inputs + outputs)
    assert 0 < found.tuning_loss < 10
    assert math.isnan(found.test_accuracy), "nothing was to be tested"
    again, before = outcome_of(trial, place)
    assert before
    assert (again.trial, again.tuning_loss, again.seconds) == (trial, found.tuning_loss, found.seconds)
    other = replace(place, digest="another", base=tmp_path / "nowhere")
    with pytest.raises(StartupError):  # it would run again
        outcome_of(trial, other)
