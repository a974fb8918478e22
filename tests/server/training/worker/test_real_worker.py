"""A real worker: what it trains in, and a base that goes away while it waits, and comes back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.api.train.answers import job_document
from server.training.queue.jobs import Status
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from server.training.worker.job_pipe import EXIT_NO_BASE
from tests.server.training.job_kit import until
from tests.server.training.worker.attempt_kit import Shop, job_data

SPEC = JobSpec("codes", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=1, max_length=48))

PATIENCE = 240.0
"""Seconds: a job's process takes four to start, and many where others want the cores."""


@contextmanager
def working(shop: Shop, model: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`smolora worker`; what it says goes to HOME/said."""
    flags = [f"--home={shop.home}", f"--model={model}", "--dtype=fp16", "--no-native"]
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
    shown = json.dumps([job_document(second), [event.message for event in shop.jobs.events("second")]])
    assert str(shop.home) not in shown
    assert "can't load the base" in shown

    away.rename(model)
    with working(shop, model):
        until(lambda: shop.jobs.get("second").status.has_ended, PATIENCE)
    assert shop.jobs.get("second").status is Status.SUCCEEDED
