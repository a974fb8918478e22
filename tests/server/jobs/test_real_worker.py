"""A real worker: its dtype, a base that disappears and returns, and jobs that give way to others."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.names import Viewpoint
from server.access.principal import Quota
from server.access.projects import Projects
from server.api.train_answers import JobAnswer
from server.jobs.jobs import Status
from server.jobs.pipe import EXIT_NO_BASE
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.server.jobs.attempt_kit import Shop, job_data
from tests.server.jobs.job_kit import until

SPEC = JobSpec("codes", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=1, max_length=48))

PATIENCE = 240.0
"""Seconds: a job's process takes four to start, and many on a busy machine."""


@contextmanager
def working(shop: Shop, model: Path, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `smolora worker`, with `more` flags; its output goes to HOME/said."""
    flags = [f"--home={shop.home}", f"--model={model}", "--dtype=fp16", "--no-native", *more]
    with open(shop.home / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "worker", *flags],
            stderr=said,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.thorough  # the dtype: model/test_device.py; a worker without a base: test_worker.py
def test_it_trains_in_fp32_and_jobs_wait_for_a_base(shop: Shop) -> None:
    model, away = shop.home / "base", shop.home / "away"
    shutil.copytree(shop.base.directory, model)
    data = job_data(shop.base, num_held_out=0)
    shop.submit(SPEC, data, "first")
    with working(shop, model) as worker:
        until(lambda: shop.jobs.get("first").status.has_ended, PATIENCE)
        assert shop.jobs.get("first").status is Status.SUCCEEDED
        report = shop.jobs.report("first")
        assert report is not None
        environment = report["environment"]
        assert isinstance(environment, dict)
        assert environment["dtype"] == "fp32", "fp16 without loss scaling loses gradients"
        model.rename(away)
        for job_id in ("second", "third"):
            shop.submit(replace(SPEC, name=job_id), data, job_id)
        assert worker.wait(PATIENCE) == EXIT_NO_BASE
    said = (shop.home / "said").read_text()
    assert f"the base can't be loaded, so this worker ends, and jobs wait: SMOLORA_MODEL={model}" in said
    second = shop.jobs.get("second")
    assert [shop.jobs.get(job_id).status for job_id in ("second", "third")] == [Status.QUEUED] * 2
    shown = JobAnswer.of(second).model_dump_json()
    shown += "".join(event.message for event in shop.jobs.events("second"))
    assert str(shop.home) not in shown
    assert "can't load the base" in shown

    away.rename(model)
    with working(shop, model):
        until(lambda: shop.jobs.get("second").status.has_ended, PATIENCE)
    assert shop.jobs.get("second").status is Status.SUCCEEDED


@pytest.mark.thorough  # turns: queue/test_turns.py; the bits: loop/test_interruptions.py
def test_a_job_of_days_gives_way_to_another_projects_job(shop: Shop) -> None:
    """The one-step job starts at most a slice, a step and a process start after its submission."""
    data = job_data(shop.base, num_held_out=0)
    time_slice = 3.0
    shop.submit(replace(SPEC, training=replace(SPEC.training, max_steps=1_000_000)), data, "days")
    Projects(shop.engine).put("other", Quota(), who="test")
    other = shop.jobs.of(Viewpoint("other"))
    with working(shop, shop.base.directory, f"--train-slice={time_slice}"):
        until(lambda: shop.jobs.get("days").progress, PATIENCE)
        data.save(shop.files.directory("short"))
        other.submit(SPEC, job_id="short", data={})
        until(lambda: shop.jobs.get("short").status.has_ended, PATIENCE)
        until(lambda: shop.jobs.get("days").attempt == 2, PATIENCE)
        shop.jobs.cancel("days")
    short = shop.jobs.get("short")
    assert short.status is Status.SUCCEEDED
    assert short.started_at is not None
    assert (short.started_at - short.created_at).total_seconds() < time_slice + 60.0, "seconds on an idle machine"
    messages = [event.message for event in shop.jobs.events("days", limit=100_000) if event.type == "message"]
    assert messages[:2] == ["queued", "started"]
    assert re.fullmatch(r"gave way to another project's job after \d+ s; goes on at its turn", messages[2])
    assert messages[3:] == ["started again (attempt 2)", "cancelled"]


@pytest.mark.thorough  # the queue: test_jobs.py; the weights: test_interruptions.py
def test_a_running_training_is_stopped_and_publishes(shop: Shop) -> None:
    data = job_data(shop.base, num_held_out=0)
    shop.submit(replace(SPEC, training=replace(SPEC.training, max_steps=1_000_000)), data, "long")
    with working(shop, shop.base.directory):
        until(lambda: shop.jobs.get("long").progress, PATIENCE)
        shop.jobs.stop("long")
        until(lambda: shop.jobs.get("long").status.has_ended, PATIENCE)
    job, report = shop.jobs.get("long"), shop.jobs.report("long")
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 2), job.error
    assert report is not None
    assert 0 < int(str(report["steps"])) < 1_000_000
    assert job.adapter is not None
    messages = [event.message for event in shop.jobs.events("long", limit=100_000) if event.type == "message"]
    assert [message.partition(",")[0] for message in messages[:3]] == ["queued", "started", "ending early"]
    assert messages[3:5] == ["back in the queue", "started again (attempt 2)"]
