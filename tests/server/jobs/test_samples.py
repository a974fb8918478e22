"""Answers to held-out prompts while a job trains: at which steps, which answers, and how long they are kept."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from adapters.errors import InvalidInput
from adapters.lora import LoraWeights
from server.errors import GenerationFailed
from server.jobs.files import Retention
from server.jobs.jobs import Status
from server.jobs.leases import Claim
from server.jobs.reporter import Leave
from server.jobs.scoring import MAX_SAMPLE_TOKENS, MORE_TOKENS, complete
from server.model.base.weights import BaseModel
from server.training.encoding import Sample
from server.training.job_data import DATA_NAME, JobData
from server.training.run import MAX_SAMPLED
from server.training.spec import JobSpec, LoraSpec, Method, TrainingSpec
from tests.kits.engines import random_adapter
from tests.server.jobs.attempt_kit import Interruption, Shop, job_data, rows_of_codes

TRAINING = TrainingSpec(
    max_steps=4, learning_rate=2e-2, batch_size=4, max_length=48, eval_steps=2, schedule="constant", warmup_ratio=0
)
SPEC = JobSpec("codes", lora=LoraSpec(rank=2), training=TRAINING)


@pytest.fixture(scope="module")
def data(tiny_base: BaseModel) -> JobData:
    encoder, held_out = rows_of_codes(tiny_base, 8, 5)
    return replace(job_data(tiny_base, num_held_out=5), samples=encoder.samples(held_out, 48))


def answers(base: BaseModel, weights: LoraWeights | None, samples: Sequence[Sample]) -> list[str | None]:
    """Return the answers to samples alone."""
    found, matches = complete(base, weights, samples, ())
    assert matches is None
    return found


def sampled(shop: Shop, job_id: str = "job") -> list[tuple[object, object]]:
    """Return the step and the samples of each of the job's events that has samples."""
    events = shop.jobs.events(job_id, limit=10_000)
    return [(event.data["step"], event.data["samples"]) for event in events if "samples" in event.data]


def trained(shop: Shop, spec: JobSpec, data: JobData, job_id: str = "job") -> object:
    """Run the job, and return the digest of its adapter."""
    shop.submit(replace(spec, name=job_id), data, job_id)
    shop.attempt()
    job = shop.jobs.get(job_id)
    assert job.adapter is not None, job.error
    return job.adapter["digest"]


def document(data: JobData, base: BaseModel, weights: LoraWeights) -> list[dict[str, object]]:
    """Return what is stored of the samples."""
    of_base, of_tuned = (answers(base, of, data.samples) for of in (None, weights))
    return [
        {"prompt": one.prompt, "wanted": one.reference.text, "base": before, "tuned": after}
        for one, before, after in zip(data.samples, of_base, of_tuned, strict=True)
    ]


def test_each_evaluation_has_the_answers_of_its_weights(shop: Shop, data: JobData) -> None:
    """They are those of jobs that end there, without and with evaluations during training."""
    whole = trained(shop, SPEC, data)
    short = trained(shop, replace(SPEC, training=replace(TRAINING, max_steps=2, eval_steps=None)), data, "short")
    found = sampled(shop)
    expected = [document(data, shop.base, shop.store.load(str(digest))) for digest in (short, whole)]
    assert found == [(2, expected[0]), (4, expected[1])]
    assert sampled(shop, "short") == found[:1]
    assert [one["prompt"] for one in expected[0]] == [one.prompt for one in data.samples]
    assert expected[0] != expected[1], "the adapter answers otherwise"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_samples_change_no_byte_of_the_adapter(shop: Shop, data: JobData, dropout: float) -> None:
    spec = replace(SPEC, lora=replace(SPEC.lora, dropout=dropout))
    without = trained(shop, spec, replace(data, samples=()), "without")
    assert trained(shop, spec, data, "with") == without
    assert (len(sampled(shop, "with")), sampled(shop, "without")) == (2, [])


@pytest.mark.parametrize(
    ("how", "num_moments"), [("kill", 3), pytest.param("leave", 8, marks=pytest.mark.thorough)]
)
def test_a_resumed_job_neither_loses_nor_doubles_samples(
    shop: Shop, data: JobData, how: Interruption, num_moments: int
) -> None:
    spec = replace(SPEC, training=replace(TRAINING, max_steps=5, checkpoint_steps=3))
    shop.submit(replace(spec, name="whole"), data, "whole")
    last = shop.attempt().num_moments
    (whole, expected) = (shop.jobs.get("whole").adapter, sampled(shop, "whole"))
    assert [step for step, _ in expected] == [2, 4, 5]
    for moment in range(last // (num_moments + 1), last, last // num_moments):
        shop.submit(replace(spec, name=f"at-{moment}"), data, f"at-{moment}")
        shop.attempt(moment, how)
        if not shop.jobs.get(f"at-{moment}").status.has_ended:
            shop.attempt()
        assert sampled(shop, f"at-{moment}") == expected, f"moment {moment}"
        adapter = shop.jobs.get(f"at-{moment}").adapter
        assert whole is not None
        assert adapter is not None
        assert adapter["digest"] == whole["digest"]


def test_a_job_that_was_stopped_shows_the_answers_of_its_last_step(shop: Shop, data: JobData) -> None:
    steps = list[int]()

    def stop_at_the_third_step() -> None:
        steps.append(len(steps) + 1)
        if len(steps) == 3:
            shop.leases.heartbeat(Claim("job", 1, "worker"), progress={"step": 2})
            shop.jobs.stop("job")
            raise Leave

    shop.submit(replace(SPEC, training=replace(TRAINING, max_steps=9)), data)
    shop.attempt(on_metrics=stop_at_the_third_step)
    shop.attempt()
    assert shop.jobs.get("job").status is Status.SUCCEEDED
    assert [step for step, _ in sampled(shop)] == [2, 3]


@pytest.mark.parametrize(("num_steps", "expected"), [(21, [6, 12, 18, 21]), (3, [1, 2, 3])])
def test_many_evaluations_share_few_samples(
    shop: Shop, data: JobData, num_steps: int, expected: list[int]
) -> None:
    training = replace(TRAINING, max_steps=num_steps, eval_steps=1)
    trained(shop, replace(SPEC, training=training), data)
    assert [step for step, _ in sampled(shop)] == expected
    assert len(expected) <= MAX_SAMPLED + 1


def test_samples_are_removed_with_the_jobs_files(shop: Shop, data: JobData) -> None:
    """They quote rows, which are removed, too; the events stay."""
    for name in ("kept", "removed"):
        trained(shop, SPEC, data, name)
    before = shop.jobs.events("removed")
    kept = sampled(shop, "kept")
    assert len(kept) == 2
    Retention(shop.home, shop.jobs).remove("removed")
    after = shop.jobs.events("removed")
    assert sampled(shop, "removed") == []
    assert [(event.seq, event.message, event.at) for event in after] == [
        (event.seq, event.message, event.at) for event in before
    ]
    assert [event.data for event in after] == [
        {key: value for key, value in event.data.items() if key != "samples"} for event in before
    ]
    assert sampled(shop, "kept") == kept


def test_a_job_of_an_older_release_has_no_samples(shop: Shop, data: JobData) -> None:
    shop.submit(SPEC, data)
    path = shop.files.directory("job") / DATA_NAME
    stored = json.loads(path.read_text())
    del stored["samples"]
    path.write_text(json.dumps(stored))
    shop.attempt()
    assert shop.jobs.get("job").status is Status.SUCCEEDED
    assert sampled(shop) == []


@pytest.mark.parametrize("method", ["lora", "full"])
def test_either_method_has_samples(shop: Shop, data: JobData, method: Method) -> None:
    rate = {"lora": 2e-2, "full": 1e-2}[method]
    spec = replace(SPEC, method=method, training=replace(TRAINING, learning_rate=rate))
    shop.submit(spec, data)
    shop.attempt()
    first, last = (json.dumps(samples) for _, samples in sampled(shop))
    assert first != last


def test_answers_are_short_and_no_fault_of_theirs_fails_a_job(
    tiny_base: BaseModel, data: JobData, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = data.samples
    short, most, longer = (
        Sample(first.prompt, replace(first.reference, num_tokens=num))
        for num in (4, MAX_SAMPLE_TOKENS - MORE_TOKENS, 400)
    )
    few, many, no_more = answers(tiny_base, None, [short, most, longer])
    assert few is not None
    assert many is not None
    assert many.startswith(few)
    assert len(many) > len(few)
    assert no_more == many
    weights = random_adapter(tiny_base.config.shape, 1)
    overflowing = LoraWeights({key: replace(module, scaling=1e38) for key, module in weights.modules.items()})
    assert answers(tiny_base, overflowing, data.samples) == [None] * 3
    with pytest.raises((GenerationFailed, InvalidInput)):
        complete(tiny_base, overflowing, data.samples, data.references)
    monkeypatch.setattr("server.jobs.scoring.MAX_ADAPTER_BYTES", 1)
    assert answers(tiny_base, weights, data.samples) == [None] * 3
