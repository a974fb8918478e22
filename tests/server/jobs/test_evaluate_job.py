"""Evaluations on a tiny base: next to transformers, next to a training's report, and ended at any moment."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import SmoloraError
from adapters.lora import LoraWeights
from server.decisions.questions import parse_question
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.runner import Drawn, Runner
from server.engine.sequence import Chunk
from server.jobs import evaluate_job
from server.jobs.evaluate_job import NotMeasurable, StepFailed
from server.jobs.evaluate_spec import METRICS, EvaluateSpec
from server.jobs.evaluation import MIN_BOOTSTRAP_ROWS, Answers, Measured, judge
from server.jobs.evaluation_data import EvaluationData
from server.jobs.jobs import Status
from server.jobs.scoring import completions
from server.jobs.specs import read_spec
from server.model.base.weights import BaseModel
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.jobs.attempt_kit import Interruption, Shop, exact_match, job_data, rows_of_codes
from tests.server.jobs.evaluate_kit import (
    COMPLETIONS,
    DECISIONS,
    QUESTION,
    attempt,
    dataset,
    findings,
    submit,
    values,
)
from tests.server.jobs.merge_kit import sample
from tests.server.training.data.rows_kit import measured

BLEND = "left*0.5+right*-0.4"


@pytest.fixture
def adapters(shop: Shop) -> Shop:
    """Publish two adapters of different ranks and modules."""
    shape = shop.base.config.shape
    shop.publish("left", sample(shape, 1, rank=3))
    shop.publish("right", sample(shape, 2, rank=5, names=("q_proj", "down_proj")))
    return shop


def weighted(shop: Shop, expression: str) -> list[tuple[Any, float]]:
    left, right = (shop.store.load(shop.catalog.version(name, 1).digest) for name in ("left", "right"))
    return {"base": [], "left": [(left, 1.0)], BLEND: [(left, 0.5), (right, -0.4)]}[expression]


def test_every_metric_equals_transformers(adapters: Shop, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """The base, an adapter and a blend, on rows of every kind."""
    shop = adapters
    more: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    more += [{"text": f"All of it counts, {number} times."} for number in range(8)]
    datasets = [dataset(shop, COMPLETIONS + more), dataset(shop, DECISIONS)]
    job = submit(shop, adapters=["base", "left", BLEND], datasets=datasets)
    attempt(shop)
    report = findings(shop, job)
    data_dir = shop.files.directory(job.id)
    data, reference = EvaluationData.load(data_dir), load_reference(tiny_base_dir)
    question = parse_question(QUESTION)
    for expression in ("base", "left", BLEND):
        with merged(reference, weighted(shop, expression)):
            for of_dataset in datasets:
                places = [n for n, row in enumerate(data.rows) if row.dataset == of_dataset]
                examples = [data.examples[n] for n in places]
                loss, accuracy, _ = measured(reference, examples)
                found = {
                    one["metric"]: one
                    for one in report["results"]
                    if (one["adapter"], one["dataset"]) == (expression, of_dataset)
                }
                assert found["loss"]["value"] == pytest.approx(loss, abs=1e-4)
                assert found["token_accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6)
                if len(places) >= MIN_BOOTSTRAP_ROWS:
                    assert found["loss"]["low"] < loss < found["loss"]["high"]
                assert found["loss"]["n"] == len(places)
                assert found["exact_match"]["n"] == sum(data.rows[n].reference is not None for n in places)
            briers, rights = [], []
            for row in data.rows:
                if row.asked is None:
                    continue
                scores = []
                for option in data.options[question.digest]:
                    rows = logits(reference, (*row.asked.prompt, *option)).log_softmax(-1)
                    after = rows[len(row.asked.prompt) - 1 :]
                    scores.append(sum(float(one[token]) for one, token in zip(after, option, strict=False)))
                p = torch.tensor(scores, dtype=torch.float64).softmax(0)
                wanted = torch.nn.functional.one_hot(torch.tensor(row.asked.answer), len(scores))
                briers.append(float(((p - wanted) ** 2).sum()))
                rights.append(int(p.argmax()) == row.asked.answer)
        assert values(report, "brier")[expression] == pytest.approx(sum(briers) / 9, abs=1e-4)
        assert values(report, "accuracy")[expression] == sum(rights) / 9
    assert len(set(values(report, "brier").values())) == 3


def test_loss_and_exact_match_equal_a_trainings_report(shop: Shop, tiny_base: BaseModel) -> None:
    """To the last bit: both are measured by the same code."""
    spec = JobSpec(
        "codes", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=6, learning_rate=3e-2, max_length=48)
    )
    shop.submit(spec, job_data(tiny_base, 8, 6, num_references=6), "trained")
    shop.attempt()
    report = shop.result("trained")["report"]
    assert isinstance(report, dict)
    of_training = report["evaluation"]
    _, rows = rows_of_codes(tiny_base, 8, 6)
    job = submit(shop, adapters=["base", "codes"], datasets=[dataset(shop, [vars(row) for row in rows])])
    attempt(shop)
    found = findings(shop, job)
    for name, adapter in (("base", "base"), ("tuned", "codes")):
        assert values(found, "loss")[adapter] == of_training[name]["loss"]
        assert values(found, "token_accuracy")[adapter] == of_training[name]["accuracy"]
        assert values(found, "exact_match")[adapter] == of_training[name]["exact_match"]


def test_exact_match_is_that_of_a_training(adapters: Shop, tiny_base: BaseModel) -> None:
    """Every second row's text is what the base answers. Flips show whole answers."""
    shop = adapters
    job = submit(shop, adapters=["base", "left"], datasets=[dataset(shop, COMPLETIONS)], metrics=["exact_match"])
    directory = shop.files.directory(job.id)
    data = EvaluationData.load(directory)
    references = [row.reference for row in data.rows if row.reference is not None]
    answers = completions(tiny_base, (), references)
    references = [
        replace(one, text=f"{answer}" if number % 2 else f"{answer}x")
        for number, (one, answer) in enumerate(zip(references, answers, strict=True))
    ]
    rows = [replace(row, reference=one) for row, one in zip(data.rows, references, strict=True)]
    replace(data, rows=rows).save(directory)
    attempt(shop)
    report = findings(shop, job)
    left = shop.store.load(shop.catalog.version("left", 1).digest)
    assert exact_match(tiny_base, None, references) == [False, True] * 6
    assert exact_match(tiny_base, left, references) == [False] * 12
    assert values(report, "exact_match") == {"base": 0.5, "left": 0}
    (difference,) = report["differences"]
    assert (difference["difference"], difference["gained"], difference["lost"]) == (-0.5, 0, 6)
    tuned = completions(tiny_base, ((left, 1.0),), references)
    assert [(flip["row"], flip["answers"], flip["gained"]) for flip in report["flips"]] == [
        (row, [answers[row], tuned[row]], False) for row in range(1, 12, 2)
    ]


@pytest.mark.parametrize("metrics", [["json_valid"], ["exact_match", "json_valid"]])
def test_completions_of_rows_with_a_schema_may_be_long(
    shop: Shop, metrics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other answers than the reference may be valid. Only rows that a metric needs are completed."""
    rows = [dict(row) for row in COMPLETIONS[:3]]
    rows[1]["schema"] = {"type": "object"}
    job = submit(shop, adapters=["base"], datasets=[dataset(shop, rows)], metrics=metrics)
    lengths: list[int] = []

    def answer_nothing(engine: Engine, requests: Sequence[GenerationRequest], _: object) -> tuple[()]:
        lengths.extend(request.sampling.max_tokens for request in requests)
        return ()

    monkeypatch.setattr("server.jobs.scoring.outputs_of", answer_nothing)
    data = EvaluationData.load(shop.files.directory(job.id))
    attempt(shop)
    numbers = [row.reference.num_tokens for row in data.rows if row.reference is not None]
    longest = [number + more for number, more in zip(numbers, (8, 256, 8), strict=True)]
    assert lengths == (longest if "exact_match" in metrics else longest[1:2])


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_ended_at_each_moment_in_turn(adapters: Shop, how: Interruption) -> None:
    """What an adapter's checkpoint has isn't measured again, and the findings are those of an undisturbed job."""
    shop = adapters
    fields = {"adapters": ["base", "left"], "datasets": [dataset(shop, COMPLETIONS[:3])], "metrics": ["loss"]}
    whole = submit(shop, **fields)
    num_moments = attempt(shop).num_moments
    expected = findings(shop, whole)
    computed = []
    for moment in range(num_moments):
        job = submit(shop, **fields)
        first = attempt(shop, moment, how)
        assert not shop.jobs.get(job.id).status.has_ended
        second = attempt(shop)
        assert shop.jobs.get(job.id).status is Status.SUCCEEDED
        assert findings(shop, job) == expected
        computed.append(len(first.computed) + len(second.computed))
        events = [event.data["step"] for event in shop.jobs.events(job.id) if event.type == "metrics"]
        assert events == [1, 2]
    assert min(computed) == 2  # once for each adapter
    assert max(computed) == 3


@pytest.mark.usefixtures("loads_at_once")
@pytest.mark.parametrize("how", ["leave", "kill"])
def test_resumed_evaluation_finds_the_same_in_all_metrics(adapters: Shop, how: Interruption) -> None:
    """Completions, decisions and sums of tokens are read back from the checkpoint of the first adapter."""
    shop = adapters
    with_schema = [{**row, "schema": {"type": "object"}} for row in COMPLETIONS[:1]]
    datasets = [dataset(shop, with_schema + COMPLETIONS[1:4]), dataset(shop, DECISIONS[:4])]
    fields = {"adapters": ["base", "left", BLEND], "datasets": datasets}
    whole = submit(shop, **fields)
    num_moments = attempt(shop).num_moments
    expected = findings(shop, whole)
    assert {one["metric"] for one in expected["results"]} == set(METRICS)
    num_resumed = 0
    for moment in range(num_moments // 3, num_moments, num_moments // 5):
        job = submit(shop, **fields)
        attempt(shop, moment, how)
        num_resumed += any(shop.files.checkpoints(job.id).iterdir())
        attempt(shop)
        assert findings(shop, job) == expected
    assert num_resumed >= 3


@pytest.mark.usefixtures("loads_at_once")
def test_checkpoint_of_an_earlier_release_is_read(adapters: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has whole answers instead of judged ones."""
    shop = adapters
    datasets = [dataset(shop, COMPLETIONS[:4]), dataset(shop, DECISIONS[:4])]
    fields = {"adapters": ["base", "left"], "datasets": datasets}
    whole = submit(shop, **fields)
    answers: list[Answers] = []

    def kept_and_judged(one: Answers, *rest: Any) -> Measured:
        answers.append(one)
        return judge(one, *rest)

    monkeypatch.setattr(evaluate_job, "judge", kept_and_judged)
    num_moments = attempt(shop).num_moments
    job = submit(shop, **fields)
    attempt(shop, num_moments - 2)
    (place,) = shop.files.checkpoints(job.id).iterdir()
    state = {"step": 1, "measured": [asdict(answers[0])]}
    (place / "state.json").write_text(json.dumps(state), encoding="utf-8")
    answers.clear()
    attempt(shop)
    assert len(answers) == 2, "one of the checkpoint, and one of the other adapter"
    assert findings(shop, job) == findings(shop, whole)


@pytest.mark.parametrize("metric", ["exact_match", "brier"])
def test_failed_step_of_the_engine_ends_the_attempt_alone(
    adapters: Shop, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as for want of memory on a GPU that others use, too."""
    shop = adapters
    rows = {"exact_match": COMPLETIONS, "brier": DECISIONS}[metric]
    fields = {"adapters": ["base", "left"], "datasets": [dataset(shop, rows)], "metrics": [metric]}
    whole = submit(shop, **fields)
    attempt(shop)
    run = Runner.run
    job = submit(shop, **fields)

    def short_of_memory(runner: Runner, chunks: Sequence[Chunk]) -> list[Drawn]:
        monkeypatch.setattr(Runner, "run", run)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "run", short_of_memory)
    attempt(shop)
    assert not shop.jobs.get(job.id).status.has_ended
    assert not issubclass(StepFailed, SmoloraError), "run_job would store the error of one as the job's end"
    attempt(shop)
    assert findings(shop, job) == findings(shop, whole)


def test_a_stored_temperature_is_used_for_its_version_alone(adapters: Shop) -> None:
    """A blend has none, as in /decide."""
    shop = adapters
    question = parse_question(QUESTION)
    stored = {"format": 1, "questions": {"kind": QUESTION}, "temperatures": {question.digest: 4.0}}
    version = shop.catalog.version("left", 1)
    fields = {name: getattr(version, name) for name in ("digest", "bytes", "rank", "alpha", "parameters")}
    shop.catalog.publish("calm", **fields, target_modules=version.target_modules, config={"decisions": stored})
    rows = [{key: value for key, value in row.items() if key != "question"} for row in DECISIONS]
    names = ["left", "calm", "calm*0.5+left*0.5"]
    job = submit(shop, adapters=names, datasets=[dataset(shop, rows)])  # the question is the version's
    data = EvaluationData.load(shop.files.directory(job.id))
    assert data.temperatures == [{}, {question.digest: 4.0}, {}]
    attempt(shop)
    found = values(findings(shop, job), "brier")
    assert found["left"] == pytest.approx(found["calm*0.5+left*0.5"], abs=1e-6)
    assert abs(found["calm"] - found["left"]) > 1e-3


def test_adapter_under_which_numbers_overflow_fails_the_job(shop: Shop) -> None:
    adapter = sample(shop.base.config.shape, 1)
    huge = {key: replace(m, a=1e20 * m.a, b=1e20 * m.b) for key, m in adapter.weights.modules.items()}
    shop.publish("huge", replace(adapter, weights=LoraWeights(huge)))
    for metric in ("loss", "exact_match"):
        submit(shop, adapters=["base", "huge"], datasets=[dataset(shop, COMPLETIONS)], metrics=[metric])
        with pytest.raises(NotMeasurable, match="huge can't be measured: "):
            attempt(shop)
        (running,) = shop.jobs.list(Status.RUNNING, evaluations=True)
        shop.jobs.cancel(running.id)


def test_a_specification_is_read_back(adapters: Shop) -> None:
    job = submit(adapters, adapters=["base", BLEND], datasets=[dataset(adapters, COMPLETIONS)])
    assert isinstance(job.spec, EvaluateSpec)
    assert job.spec.metrics == ("loss", "token_accuracy", "exact_match")
    assert set(job.spec.metrics) < set(METRICS)
    assert read_spec(job.spec.to_document()) == job.spec
    assert (job.kind, job.name) == ("evaluate", "base")
    assert len(job.spec.parents) == 2
    assert adapters.jobs.in_use(job.spec.parents[0])
