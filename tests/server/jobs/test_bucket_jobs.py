"""Jobs of machines that share a bucket: one resumes another's job from its rows and its checkpoint."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
import torch

from adapters.errors import BytesUnavailable
from server.database import connect
from server.jobs.files import JobFiles, Retention
from server.jobs.jobs import Jobs, Status
from server.model.base.weights import BaseModel
from server.training.checkpoint import Checkpoint, Checkpoints
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.kits.buckets import Proxy
from tests.server.jobs.attempt_kit import Interruption, Shop, job_data
from tests.server.jobs.job_kit import submit

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

    OpenCheckpoints = Callable[..., Checkpoints]

pytestmark = pytest.mark.cluster
TRAINING = TrainingSpec(max_steps=5, learning_rate=1e-2, batch_size=4, max_length=48, checkpoint_steps=2)
SPEC = JobSpec("codes", lora=LoraSpec(rank=2), training=TRAINING)

Machine = Callable[[str], Shop]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """The database of all machines."""
    engine = connect(tmp_path)
    yield engine
    engine.dispose()


@pytest.fixture
def machine(tmp_path: Path, engine: sa.Engine, tiny_base: BaseModel, bucket: "Bucket") -> Machine:
    def on(name: str) -> Shop:
        (tmp_path / name).mkdir()
        return Shop(tmp_path / name, engine, tiny_base, bucket)

    return on


@pytest.mark.usefixtures("loads_at_once")
@pytest.mark.parametrize("how", ["leave", "kill"])
def test_another_machine_resumes_a_job(machine: Machine, bucket: "Bucket", how: Interruption) -> None:
    a, b, c = (machine(name) for name in "abc")
    data = job_data(a.base)
    a.submit(replace(SPEC, name="whole"), data, "whole")
    moments = b.attempt().num_moments  # it gets its rows from the bucket
    expected = b.result("whole")
    assert b.catalog.get("whole").versions[0].digest == expected_digest(b, "whole")

    a.submit(replace(SPEC, name="moved"), data, "moved")
    b.attempt(moments * 2 // 3, how)
    assert a.jobs.get("moved").status is Status.QUEUED
    step = Checkpoints(b.files.checkpoints("moved"), 0).stored()[-1][1]
    assert step >= 2
    listener = c.attempt()
    assert listener.num_moments < moments, "it began where the other one was"
    assert c.result("moved") == expected
    a.store.verify(expected_digest(a, "moved"))
    assert expected_digest(a, "moved") == expected_digest(a, "whole")

    c.files.sweep_bucket(lambda ids: {"moved": a.jobs.get("moved").status})
    assert bucket.listed("jobs/moved/") == []
    left = sorted(stored.key.rsplit("/", 1)[1] for stored in bucket.listed("jobs/whole/rows/"))
    assert left == ["data.json", "train.safetensors", "validation.safetensors"]
    retention = Retention(a.home, a.jobs, bucket)
    assert retention.remove("whole") > 1000
    assert [removal.job_id for removal in retention.prune(datetime.now(UTC))] == ["moved"]
    assert bucket.listed("jobs/") == []


def expected_digest(shop: Shop, name: str) -> str:
    return shop.catalog.get(name).versions[0].digest


def test_rows_of_a_cancelled_job_are_removed(machine: Machine, bucket: "Bucket") -> None:
    a = machine("a")
    for job_id in ("ended", "waits"):
        a.submit(SPEC, job_data(a.base), job_id)
    Retention(a.home, a.jobs, bucket).cancel("ended")
    assert bucket.listed("jobs/ended/") == []
    assert len(bucket.listed("jobs/waits/rows/")) == 3


def test_prune_reports_a_removed_job_once(tmp_path: Path, engine: sa.Engine) -> None:
    """This holds even if machines share a directory, where a folder could outlive its files."""
    pytest.importorskip("obstore")
    from adapters.storage.bucket import Bucket as Real

    shared = Real.open(f"file://{tmp_path}/shared")
    jobs = Jobs(engine)
    submit(jobs, "ended")
    shared.put("jobs/ended/model-1/config.json", b"{}")
    jobs.cancel("ended")
    retention = Retention(tmp_path, jobs, shared)
    assert [removal.job_id for removal in retention.prune(datetime.now(UTC))] == ["ended"]
    assert retention.prune(datetime.now(UTC)) == []


def test_other_machines_have_a_full_models_files(
    machine: Machine, tmp_path: Path, engine: sa.Engine, tiny_base: BaseModel
) -> None:
    a, b = machine("a"), machine("b")
    alone = Shop(tmp_path / "alone", engine, tiny_base)
    training = TrainingSpec(max_steps=1, batch_size=2, max_length=48)
    for shop, job_id in ((alone, "same"), (a, "job")):
        shop.submit(JobSpec("codes", method="full", training=training), job_data(a.base), job_id)
        shop.attempt()
    there = b.files.fetch_model("job")
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in alone.files.model("same").iterdir()
    }
    assert not a.files.model("job").exists(), "a worker's HOME is scratch"
    assert a.result("job") == alone.result("same")
    assert not b.files.fetch_model("no-job").exists()


def test_a_model_outlives_the_database(tmp_path: Path, bucket: "Bucket", monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, it was restored from an older copy: rows of unknown jobs are removed, models stay."""
    for name in (
        "rows/data.json",
        "checkpoint-1-2/state.json",
        "model-1/config.json",
        "model-1/model.safetensors",
    ):
        bucket.put(f"jobs/job-1/{name}", b"{}")
    monkeypatch.setattr("server.jobs.files._ORPHAN_SECONDS", -60.0)
    JobFiles(tmp_path, bucket).sweep_bucket(lambda ids: {})
    assert [stored.key for stored in bucket.listed("jobs/")] == [
        "jobs/job-1/model-1/config.json",
        "jobs/job-1/model-1/model.safetensors",
    ]


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
def test_only_the_model_of_a_successful_job_stays(tmp_path: Path, bucket: "Bucket", status: Status) -> None:
    bucket.put("jobs/job-1/model-1/config.json", b"{}")
    JobFiles(tmp_path, bucket).sweep_bucket(lambda ids: dict.fromkeys(ids, status))
    assert bool(bucket.listed("jobs/")) is (status is Status.SUCCEEDED)


@pytest.fixture
def open_checkpoints(tmp_path: Path, bucket: "Bucket") -> "OpenCheckpoints":
    def on(name: str, token: int, through: "Bucket | None" = None) -> Checkpoints:
        return Checkpoints(tmp_path / name, token, through or bucket, "job")

    return on


def checkpoint(step: int, value: float) -> Checkpoint:
    return Checkpoint(step, {"masters": torch.full((3,), value)}, {"note": "é"})


def test_a_stale_worker_overwrites_nothing(open_checkpoints: "OpenCheckpoints", bucket: "Bucket") -> None:
    """The first worker was stopped, and continues after the second has got the job."""
    first, second, third = (open_checkpoints(name, token) for name, token in (("a", 1), ("b", 2), ("c", 3)))
    assert first.newest() is None
    first.save(checkpoint(10, 1.0))
    found = second.newest()
    assert found is not None
    assert (found.step, found.state["note"]) == (10, "é")
    second.save(checkpoint(11, 2.0))
    first.save(checkpoint(500, 1.0))
    first.save(checkpoint(501, 1.0))
    newest = third.newest()
    assert newest is not None
    assert (newest.step, newest.tensors["masters"].tolist()) == (11, [2.0] * 3)
    assert {stored.key.split("/")[2] for stored in bucket.listed()} == {"checkpoint-2-11"}


def test_an_incomplete_checkpoint_is_ignored(open_checkpoints: "OpenCheckpoints", bucket: "Bucket") -> None:
    a = open_checkpoints("a", 1)
    a.save(checkpoint(1, 1.0))
    bucket.put("jobs/job/checkpoint-1-2/state.safetensors", b"half")
    found = open_checkpoints("b", 2).newest()
    assert found is not None
    assert found.step == 1
    a.save(checkpoint(3, 3.0))
    assert found.state["step"] == 1


def test_training_continues_without_the_bucket(
    open_checkpoints: "OpenCheckpoints", proxied: "Bucket", proxy: Proxy
) -> None:
    a = open_checkpoints("a", 1, proxied)
    a.save(checkpoint(1, 1.0))
    proxy.fail("500")
    began = time.monotonic()
    a.save(checkpoint(2, 2.0))
    assert time.monotonic() - began < 4
    with pytest.raises(BytesUnavailable):  # the attempt goes back to the queue
        open_checkpoints("b", 2, proxied).newest()
    proxy.fail("")
    found = open_checkpoints("b", 2).newest()
    assert found is not None
    assert found.step == 1
    a.save(checkpoint(3, 3.0))
    found = open_checkpoints("c", 2).newest()
    assert found is not None
    assert found.step == 3


def test_old_rows_that_were_never_submitted_are_removed(
    tmp_path: Path, engine: sa.Engine, bucket: "Bucket", monkeypatch: pytest.MonkeyPatch
) -> None:
    files, jobs = JobFiles(tmp_path, bucket), Jobs(engine)
    files.directory("job-x").mkdir(parents=True)
    (files.directory("job-x") / "data.json").write_text("{}")
    files.keep("job-x")
    retention = Retention(tmp_path, jobs, bucket)
    retention.finish()
    assert len(bucket.listed("jobs/")) == 1
    monkeypatch.setattr("server.jobs.files._ORPHAN_SECONDS", -1.0)
    retention.finish()
    assert bucket.listed("jobs/") == []
