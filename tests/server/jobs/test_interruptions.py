"""Ended at any moment, by will or by force, a job goes on to every number that an undisturbed one leaves."""

from dataclasses import replace
from itertools import count

import pytest

from server.jobs.jobs import Status
from server.jobs.leases import Claim
from server.jobs.reporter import Leave
from server.model.base.weights import BaseModel
from server.training.job_data import JobData
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.server.jobs.attempt_kit import Interruption, Shop, job_data
from tests.server.jobs.merge_kit import sample

TRAINING = TrainingSpec(max_steps=5, learning_rate=1e-2, batch_size=4, max_length=48, eval_steps=2)
JOBS = {
    "stops early, and a gate": JobSpec(
        "codes",
        lora=LoraSpec(rank=2),
        training=replace(TRAINING, max_steps=9, learning_rate=0.3, early_stopping_patience=2, checkpoint_steps=3),
        publish_if="improves_latest",
        alias="best",
    ),
    "measures the last step, and has no checkpoints": JobSpec(
        "codes", lora=LoraSpec(rank=2, dropout=0.1), training=TRAINING
    ),
}


@pytest.fixture(scope="module")
def data(tiny_base: BaseModel) -> JobData:
    return job_data(tiny_base, num_held_out=20)  # enough to choose a step by


def submit(shop: Shop, spec: JobSpec, data: JobData, name: str) -> None:
    """The job of that id, for a name whose latest version is the same each time."""
    shop.publish(name, sample(shop.base.config.shape, 1))
    shop.submit(replace(spec, name=name), data, name)


@pytest.mark.parametrize(
    "how", [pytest.param("leave", marks=pytest.mark.thorough), pytest.param("kill", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("spec", JOBS.values(), ids=JOBS)
def test_ended_at_each_moment_in_turn(shop: Shop, data: JobData, spec: JobSpec, how: Interruption) -> None:
    """How many there are differs by a few: the adapter is read meanwhile that completes the held-out prompts."""
    submit(shop, spec, data, "whole")
    least = shop.attempt().num_moments // 2
    expected = shop.result("whole")
    for moment in count():
        submit(shop, spec, data, name := f"at-{moment}")
        shop.attempt(moment, how)
        if has_ended := shop.jobs.get(name).status.has_ended:
            assert moment > least
        else:
            shop.attempt()
        assert shop.result(name) == expected, f"moment {moment}"
        if has_ended:
            break


def test_a_job_that_ends_early_publishes_its_best_weights(shop: Shop, data: JobData) -> None:
    steps = list[int]()

    def stop_at_the_fourth_step() -> None:
        steps.append(len(steps) + 1)
        if len(steps) == 4:
            shop.leases.heartbeat(Claim("job", 1, "worker"), progress={"step": 3})
            shop.jobs.stop("job")
            raise Leave

    training = replace(TRAINING, max_steps=9, learning_rate=0.3, eval_steps=1)  # too fast: the loss soon rises
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2), training=training), data)
    shop.attempt(on_metrics=stop_at_the_fourth_step)
    shop.attempt()
    job, report = shop.jobs.get("job"), shop.jobs.report("job")
    assert report is not None
    assert (job.status, report["steps"]) == (Status.SUCCEEDED, 4)  # which had been computed
    assert job.adapter is not None
    curves = report["curves"]
    assert isinstance(curves, dict)
    losses = dict(curves["eval_loss"])
    assert losses[report["kept_step"]] == min(losses.values())
    assert [event.data["step"] for event in shop.jobs.events("job") if event.type == "metrics"] == [1, 2, 3, 4]
