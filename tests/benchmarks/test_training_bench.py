"""The training benchmarks' own arithmetic, and one reduced run of the speed's on a tiny base."""
# ruff: noqa: RUF001

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import methods_report, train
from benchmarks.methods import Outcome, Trial, best
from benchmarks.ratings import FILES, NESTED, PACKAGE, Rated, read_sets, rule_classifier
from benchmarks.results import Machine
from benchmarks.sentiment import LABELS, blend, classify, examples_of, prompt_of, score
from benchmarks.train import WORKS, Row
from benchmarks.training_runs import Measured
from server.model.smollm import NoAdapters, SmolLM
from server.model.weights import BaseModel
from server.training.trained_rows import TrainedRows
from tests.engine_kit import random_adapter

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source distribution like the package's: each set has 40 documents of 3 sentences, and some oddities."""
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


def test_the_packages_rules_are_its_own(source: Path) -> None:
    rules = rule_classifier(source)
    assert rules.polarity_scores("a good day")["compound"] > 0 > rules.polarity_scores("rain")["compound"]


def test_scores() -> None:
    sentences = [Rated("", True), Rated("", True), Rated("", True), Rated("", False)]
    found = score([True, True, False, False], sentences)
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert score([True] * 4, sentences).macro_f1 == pytest.approx((6 / 7 + 0) / 2)


def test_a_blend_is_the_weighted_sum_of_the_shares(tiny_base: BaseModel) -> None:
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
    """Against the loss of each label as a completion, on sentences that the base is sure of."""
    sentences = [Rated("I love it, it is wonderful!", True), Rated("Terrible, awful, I hate it.", False)]
    model = SmolLM(real_base.config, real_base.weights, max_positions=64)
    found = classify(real_base, model, NoAdapters(), sentences)
    for answer, sentence in zip(found, sentences, strict=True):
        losses = []
        for label in LABELS:
            ids = torch.tensor(real_base.tokenizer.encode(prompt_of(sentence) + label))
            prompt = len(real_base.tokenizer.encode(prompt_of(sentence)))
            from server.training.packed_attention import PackedAttention

            attention = PackedAttention([len(ids)], CPU)
            with torch.no_grad():
                log_probs = model.logits(model.forward(ids, attention.positions, attention, NoAdapters()))
            losses.append(-float(log_probs.log_softmax(-1)[prompt - 1, ids[prompt]]))
        assert answer == (losses[1] < losses[0])
    (example, _) = examples_of(real_base, sentences)
    assert sum(example.is_target) == 2, "the label and the end token"


def measured(speed: float, memory: int) -> Measured:
    return Measured(speed, memory, 3.0)


def test_the_speed_targets() -> None:
    work = next(work for work in WORKS if work.most_memory is not None)
    row = Row(work, (measured(260, 2), measured(240, 2)), (measured(200, 5), measured(100, 5)))
    speed, memory = train.targets(row, quick=False)
    assert (speed.measured, speed.reached) == ("1.85 × PEFT (1.30–2.40)", True)
    assert (memory.wanted, memory.reached) == ("≤ 0.5 of PEFT's peak RSS", True)
    assert [target.reached for target in train.targets(row, quick=True)] == [None, None]


def test_methods_are_compared_at_their_best_rates() -> None:
    def outcome(rank: int, rate: float, tuning: float, test: float, accuracy: float) -> Outcome:
        return Outcome(
            Trial(rank, rate), 1000 * (rank or 100), 0.5, 10**9, 10**7, 10.0, 400.0, tuning, test, accuracy
        )

    outcomes = [outcome(8, 1e-3, 0.5, 0.6, 0.9), outcome(8, 2e-3, 0.4, 0.7, 0.8), outcome(0, 1e-5, 0.3, 0.5, 0.85)]
    assert [found.trial for found in best(outcomes)] == [Trial(0, 1e-5), Trial(8, 2e-3)]
    text = methods_report.markdown(Machine("A CPU", 2, 2, 8 << 30, "3.11", {}), "work", outcomes, quick=False)
    assert "| LoRA, r=8 | 8,000 (50.0%) | 1.00 GB | 10 MB | 10 s | 400 | 0.002 | 0.7000 | 0.800 |" in text
    assert "LoRA, r=8, tuning loss by learning rate: 0.001: 0.5000, 0.002: 0.4000." in text
    assert "held-out accuracy: the best LoRA (LoRA, r=8: 0.8000) does not beat full (0.8500)." in text


def test_a_reduced_run(tmp_path: Path, tiny_base_dir: Path) -> None:
    out = tmp_path / "out"
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(out)]
    (row,) = train.main(["--quick", "--only", "short", "--threads", "1", *places])
    assert row.ours[0].loss == pytest.approx(row.peer[0].loss, rel=0.005), "the same rows, before any step"
    assert min(row.ours[0].peak_rss, row.peer[0].peak_rss) > 100e6
    document = json.loads((out / "train.json").read_text())
    assert document["rows"][0]["work"]["key"] == "short"
    assert "measures nothing" not in (out / "train.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["train.json", "train.md"]
