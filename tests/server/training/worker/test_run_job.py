"""The process of a job: what it loads and where, and how it ends without memory."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.merging.recipe import Recipe
from server.config import WorkerSettings
from server.errors import StartupError
from server.model.base.weights import BaseModel
from server.training.queue.jobs import Jobs
from server.training.queue.leases import Leases
from server.training.spec import JobSpec
from server.training.worker.run_job import _load
from server.training.worker.worker import Worker
from tests.pretended.cuda import pretended_cuda
from tests.server.training.job_kit import submit, until
from tests.server.training.worker.merge_kit import spec_of
from tests.server.training.worker.stub_worker import FAST

STARVED = (
    "import sys, torch\n"
    "from server.training.worker import run_job, train_job\n"
    "def run(self):\n"
    "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
    "train_job.TrainingAttempt.run = run\n"
    "sys.exit(run_job.main(sys.argv[-1]))\n"
)
"""A job's process whose training finds no memory."""


def settings_of(base_dir: Path, **settings: object) -> WorkerSettings:
    """For a base that was converted beside its directory."""
    given = {"home": base_dir.parent, "model": str(base_dir), "native": False, **settings}
    return WorkerSettings.model_validate(given)


def test_a_job_without_memory_fails_once_and_says_what_to_lower(
    tiny_base_dir: Path,
    tmp_path: Path,
    jobs: Jobs,
    leases: Leases,
    database_url: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if database_url is not None:
        monkeypatch.setenv("SMOLORA_DATABASE_URL", database_url)  # as a worker's children have it
    submit(jobs, "a")
    settings = settings_of(tiny_base_dir, home=tmp_path, device="cpu")
    command = (sys.executable, "-c", STARVED)
    timing = replace(FAST, hung=120.0)  # where every core is taken, torch's import is silent for long
    worker = Worker(tmp_path, leases, settings.model_dump(mode="json"), command=command, timing=timing)

    def was_tried() -> bool:
        worker._work()
        return jobs.get("a").attempt > 0

    until(was_tried, 120)
    job = jobs.get("a")
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert "ran out of memory" in job.error
    assert "training.packing" in job.error
    assert "training.max_length" in job.error


def test_a_merge_leaves_the_weights_in_their_file(tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    """It needs no GPU, where training would."""
    settings = settings_of(tiny_base_dir, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(StartupError):
            _load(settings, JobSpec("trained"))
    base, library = _load(settings, spec_of({"a": 1.0}, Recipe("ties")))
    assert (base.device.type, base.dtype, library) == ("cpu", torch.float32, None)
    assert base.digest == tiny_base.digest


def test_a_job_keeps_to_its_share_of_the_gpu(tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    with pretended_cuda() as card:
        base, _ = _load(settings_of(tiny_base_dir, device="cuda", train_memory=0.3), JobSpec("trained"))
        assert base.device.type == "cuda"
        assert card.memory_fraction == 0.3
    with pretended_cuda() as card:
        _load(settings_of(tiny_base_dir, device="cuda"), JobSpec("trained"))
        assert card.memory_fraction == 1.0, "a worker elsewhere has what is free"
