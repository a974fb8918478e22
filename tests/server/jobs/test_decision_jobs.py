"""What a job makes of its held-out decisions: temperatures, the report's figures, and gates by them.

The reference is transformers' scores.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.lora import LoraWeights
from server.decisions.calibration import fit_temperature, softmax
from server.decisions.questions import parse_question
from server.decisions.stored import StoredDecisions
from server.jobs.scoring import decision_scores
from server.model.base.weights import BaseModel
from server.model.text.chat import PromptEncoder
from server.training.encoding import RowEncoder
from server.training.job_data import DataFacts, JobData
from server.training.rows import DecisionRow
from server.training.spec import JobSpec, LoraSpec, Metric, TrainingSpec
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.jobs.attempt_kit import Shop

QUESTION = parse_question(
    {"type": "choice", "instructions": "", "name": "kind", "choices": [{"value": "a"}, {"value": "b"}]}
)
SPEC = JobSpec(
    "kinds", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=2, learning_rate=1e-3, max_length=256)
)


def decisions(base: BaseModel, num_held_out: int, answers: str = "abb") -> JobData:
    """Return a job's data, whose rows have the answers in turn."""
    eos = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos).asking({"kind": QUESTION})
    rows = [DecisionRow(f"Row {n}", answers[n % len(answers)], "kind") for n in range(8 + num_held_out)]
    train, held_out = (encoder.encode_all(part, 256).examples for part in (rows[:8], rows[8:]))
    return JobData(
        train,
        held_out,
        [],
        DataFacts("d", 8, train.num_tokens, train.num_targets, 0, "v", num_held_out, kinds={"decision": 8}),
        base.digest,
        decisions=StoredDecisions((QUESTION,)),
        asked=encoder.asked(rows[8:]),
        options={QUESTION.digest: tuple(encoder.decisions.options(QUESTION))},
    )


def report_of(shop: Shop) -> dict[str, Any]:
    """Return the report's entry of the job's question."""
    report = shop.jobs.report("job")
    assert report is not None
    found: Any = report["decisions"]
    assert set(found) == {"kind"}
    return dict(found["kind"])


def temperatures(shop: Shop, data: JobData) -> dict[str, float]:
    shop.submit(SPEC, data)
    shop.attempt()
    stored = StoredDecisions.of(shop.catalog.version("kinds", 1).config)
    assert stored is not None
    assert stored.questions == (QUESTION,)
    return dict(stored.temperatures)


def reference_scores(directory: Path, data: JobData, weights: LoraWeights) -> list[list[float]]:
    options = data.options[QUESTION.digest]
    scores = []
    with merged(load_reference(directory), [(weights, 1.0)]) as model:
        for one in data.asked:
            found = []
            for option in options:
                rows = logits(model, (*one.prompt, *option)).log_softmax(-1)[len(one.prompt) - 1 :]
                found.append(sum(float(row[token]) for row, token in zip(rows, option, strict=False)))
            scores.append(found)
    return scores


def test_a_version_stores_the_temperature_of_its_held_out_rows(
    shop: Shop, tiny_base: BaseModel, tiny_base_dir: Path
) -> None:
    data = decisions(tiny_base, 24)
    found = temperatures(shop, data)
    tuned = shop.store.load(shop.catalog.version("kinds", 1).digest)
    scores = reference_scores(tiny_base_dir, data, tuned)
    expected = fit_temperature(scores, [one.answer for one in data.asked])
    assert 0.06 < expected < 19  # otherwise any score would give it
    assert found == {QUESTION.digest: pytest.approx(expected, rel=1e-3)}
    report = report_of(shop)
    assert report["temperature"] == found[QUESTION.digest]
    # the figures without a temperature follow from the scores alone
    right = [one.answer for one in data.asked]
    brier = sum(((row - np.eye(2)[answer]) ** 2).sum() for row, answer in zip(softmax(scores), right, strict=True))
    assert report["tuned"]["uncalibrated"]["brier"]["value"] == pytest.approx(brier / 24, rel=1e-3)
    num_right = sum(row.index(max(row)) == answer for row, answer in zip(scores, right, strict=True))
    assert report["tuned"]["accuracy"]["value"] == num_right / 24
    metrics = shop.jobs.get("job").metrics
    assert metrics["decision_accuracy"] == num_right / 24
    assert metrics["decision_brier"] == pytest.approx(report["tuned"]["brier"]["value"])
    assert metrics["base_decision_accuracy"] == report["base"]["accuracy"]["value"]


def test_few_held_out_rows_have_no_temperature(shop: Shop, tiny_base: BaseModel) -> None:
    assert temperatures(shop, decisions(tiny_base, 10)) == {}
    report = report_of(shop)
    assert (report["num_rows"], report["temperature"], report["reliability"]) == (10, None, [])
    assert set(report["tuned"]) == {"accuracy"}


@pytest.mark.parametrize("metric", ["accuracy", "brier"])
@pytest.mark.parametrize("learns", [True, False])
def test_a_gate_by_decisions(shop: Shop, tiny_base: BaseModel, metric: Metric, learns: bool) -> None:
    """The base has all rows wrong. An adapter that learns has them right, and one that doesn't isn't published."""
    data = decisions(tiny_base, 24)
    scores = decision_scores(tiny_base, None, data, lambda: None)
    assert scores is not None
    prefers_first = sum(first > second for first, second in scores) > len(scores) / 2
    data = decisions(tiny_base, 24, "b" if prefers_first else "a")
    training = replace(SPEC.training, max_steps=20, learning_rate=3e-2 if learns else 1e-12, eval_steps=10)
    shop.submit(replace(SPEC, training=training, publish_if="improves_base", publish_metric=metric), data)
    shop.attempt()
    job, report = shop.jobs.get("job"), shop.jobs.report("job")
    assert report is not None
    comparison: Any = report["comparisons"]
    assert comparison["base"]["metric"] == metric
    assert comparison["base"]["verdict"] == ("better" if learns else "can't tell")
    assert (job.adapter is not None) is learns


def test_rows_that_cannot_be_scored(tiny_base: BaseModel) -> None:
    """A row without options, or too long for the base, has no scores. Without other rows, nothing is measured."""
    data = decisions(tiny_base, 2)
    measure = partial(decision_scores, tiny_base, None, yield_or_leave=lambda: None)
    first, second = data.asked
    too_long = replace(first, prompt=first.prompt * (tiny_base.config.max_position_embeddings // 8))
    found = measure(replace(data, asked=[too_long, second, replace(first, question="unknown")]))
    assert found is not None
    assert (found[0], len(found[1]), found[2]) == ((), 2, ())
    assert measure(replace(data, asked=[])) is None
    assert measure(replace(data, options={})) is None
