"""Temperatures that a job fits to its held-out decisions, next to those of transformers' scores."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.lora import LoraWeights
from server.decisions.calibration import fit_temperature
from server.decisions.questions import parse_question
from server.decisions.stored import StoredDecisions
from server.model.base.weights import BaseModel
from server.model.text.chat import PromptEncoder
from server.training.encoding import RowEncoder
from server.training.job_data import DataFacts, JobData
from server.training.rows import DecisionRow
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.jobs.attempt_kit import Shop

QUESTION = parse_question(
    {"type": "choice", "instructions": "", "name": "kind", "choices": [{"value": "a"}, {"value": "b"}]}
)
SPEC = JobSpec(
    "kinds", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=2, learning_rate=1e-3, max_length=256)
)


def decisions(base: BaseModel, num_held_out: int) -> JobData:
    """Return a job's data: every third answer is the second option."""
    eos = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos).asking({"kind": QUESTION})
    rows = [DecisionRow(f"Row {n}", "b" if n % 3 else "a", "kind") for n in range(8 + num_held_out)]
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


def temperatures(shop: Shop, data: JobData) -> dict[str, float]:
    shop.submit(SPEC, data)
    shop.attempt()
    stored = StoredDecisions.of(shop.catalog.version("kinds", 1).config)
    assert stored is not None
    assert stored.questions == (QUESTION,)
    return dict(stored.temperatures)


def reference_temperature(directory: Path, data: JobData, weights: LoraWeights) -> float | None:
    options = data.options[QUESTION.digest]
    scores = []
    with merged(load_reference(directory), [(weights, 1.0)]) as model:
        for one in data.asked:
            found = []
            for option in options:
                rows = logits(model, (*one.prompt, *option)).log_softmax(-1)[len(one.prompt) - 1 :]
                found.append(sum(float(row[token]) for row, token in zip(rows, option, strict=False)))
            scores.append(found)
    return fit_temperature(scores, [one.answer for one in data.asked])


def test_a_version_stores_the_temperature_of_its_held_out_rows(
    shop: Shop, tiny_base: BaseModel, tiny_base_dir: Path
) -> None:
    data = decisions(tiny_base, 24)
    found = temperatures(shop, data)
    tuned = shop.store.load(shop.catalog.version("kinds", 1).digest)
    expected = reference_temperature(tiny_base_dir, data, tuned)
    assert expected is not None
    assert 0.06 < expected < 19  # otherwise any score would give it
    assert found == {QUESTION.digest: pytest.approx(expected, rel=1e-3)}


def test_few_held_out_rows_and_older_jobs_have_no_temperature(shop: Shop, tiny_base: BaseModel) -> None:
    assert temperatures(shop, replace(decisions(tiny_base, 10))) == {}
