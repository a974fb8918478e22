"""The process of a job: its base and device, and its end if memory runs out."""

import logging
import sqlite3
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
import torch
from sqlalchemy.exc import OperationalError

from adapters.merge_recipe import Recipe
from server.config import WorkerSettings
from server.errors import StartupError
from server.jobs import tables
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Leases
from server.jobs.merge_spec import ORIGIN
from server.jobs.run_job import _load, _seconds_of_all
from server.jobs.worker import Worker
from server.model.base.weights import BaseModel
from server.model.native.model import ROW_FORMAT
from server.model.packed_adapters import PackedAdapters
from server.model.rank_rows import PackedFile, RowLayout
from server.storage.reserve import DISK_FULL
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from tests.kits.fake_gpu.cuda import fake_cuda
from tests.kits.native import lend_native, native_library, tiny_of
from tests.server.jobs.attempt_kit import Shop, job_data
from tests.server.jobs.job_kit import submit, until
from tests.server.jobs.merge_kit import merge_spec, origin_of, spec_of
from tests.server.jobs.stub_worker import FAST

IMPORTS = (
    "import errno, sqlite3, sys, threading\n"
    "from server.system.memory import exempt_from_gc\n"
    "with exempt_from_gc():\n"
    "    import torch\n"
    "    from adapters.catalog.writes import LatestMoved\n"
    "    from adapters.errors import BytesUnavailable, Interrupted, SmoloraError\n"
    "    from server.jobs import run_job, train_job\n"
)
"""As `server.jobs` imports them: collections of garbage would take as long as the imports."""

STARVED = (
    f"{IMPORTS}"
    "def run(self):\n"
    "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
    "train_job.TrainingAttempt.run = run\n"
    "sys.exit(run_job.main(sys.argv[-1]))\n"
)
"""A job's process whose training runs out of memory."""

LOADS_SLOWLY = (
    f"{IMPORTS}"
    "beats = threading.Event()\n"
    "run_job.WorkerLink.beat = lambda self: beats.set()\n"
    "def load(settings, spec):\n"
    "    raise SmoloraError('it said so' if beats.wait(30) else 'not a word')\n"
    "run_job._load = load\n"
    "sys.exit(run_job.main(sys.argv[-1]))\n"
)
"""A job's process whose base takes until the first heartbeat to load."""

REFUSED = "BytesUnavailable()"
GONE = "Interrupted()"
MOVED = "LatestMoved()"
FULL = "OSError(errno.ENOSPC, 'No space left on device')"
DATABASE_FULL = f"{GONE} from {FULL}"
LOCKED = "sqlite3.OperationalError('database is locked')"


def without(error: str, what: str = "JobFiles.fetch") -> tuple[str, ...]:
    """A job's process whose rows can't be read, with that error; or its base, with an error of `resolve_base`."""
    return (
        sys.executable,
        "-c",
        f"{IMPORTS}"
        "def fetch(*_):\n"
        f"    raise {error}\n"
        f"run_job.{what} = fetch\n"
        "sys.exit(run_job.main(sys.argv[-1]))\n",
    )


def settings_of(base_dir: Path, **settings: object) -> WorkerSettings:
    """Return settings for a base that was converted next to its directory."""
    given = {"home": base_dir.parent, "model": str(base_dir), "native": False, **settings}
    return WorkerSettings.model_validate(given)


def test_job_usage_is_processor_time() -> None:
    before, start = _seconds_of_all(2), time.process_time()
    time.sleep(0.3)
    while time.process_time() - start < 0.1:
        pass
    assert 0.1 <= (_seconds_of_all(2) - before) * 2 < 0.25, "and no sleep"


def test_a_job_without_memory_fails_once_and_says_what_to_lower(
    tiny_base_dir: Path,
    tmp_path: Path,
    jobs: Jobs,
    leases: Leases,
    database_url: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if database_url is not None:
        monkeypatch.setenv("SMOLORA_DATABASE_URL", database_url)  # as a worker's child processes have it
    submit(jobs, "a")
    settings = settings_of(tiny_base_dir, home=tmp_path, device="cpu")
    command = (sys.executable, "-c", STARVED)
    timing = replace(FAST, hung=120.0)  # on a busy machine, importing torch is silent for long
    worker = Worker(tmp_path, jobs, leases, settings.to_json(), command=command, timing=timing)

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


def num_stalled(engine: sa.Engine) -> int:
    """Return the number of counted attempts of the only job."""
    with engine.connect() as connection:
        found: int = connection.execute(sa.select(tables.jobs.c.stalled_attempts)).scalar_one()
    return found


def test_a_database_that_cant_be_opened_costs_a_job_no_attempt(
    tiny_base_dir: Path,
    tmp_path: Path,
    engine: sa.Engine,
    jobs: Jobs,
    leases: Leases,
    database_url: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another machine was upgraded first: the worker continues with its open connections."""
    if database_url is not None:
        monkeypatch.setenv("SMOLORA_DATABASE_URL", database_url)
    caplog.set_level(logging.INFO, "smolora.worker")
    submit(jobs, "a")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'of-tomorrow'")
        connection.exec_driver_sql("UPDATE schema_range SET lowest = 'of-tomorrow'")
    settings = settings_of(tiny_base_dir, home=tmp_path, device="cpu").to_json()
    start = time.monotonic()
    Worker(tmp_path, jobs, leases, settings, timing=replace(FAST, hung=120.0, hindered=0.5))._work()
    assert time.monotonic() - start > 0.5, "it waits as well"
    assert (jobs.get("a").status, jobs.get("a").attempt, num_stalled(engine)) == (Status.QUEUED, 1, 0)
    messages = [event.message for event in jobs.events("a")]
    assert messages[-2:] == ["attempt 1: its process can't use the database", "back in the queue"]
    assert "use the version of smolora that wrote it" in caplog.messages[-1], "for the operator"


def test_a_database_that_stays_locked_costs_a_job_no_attempt(
    shop: Shop, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the worker tries to release the job: a job that isn't released looks like a dead worker's."""
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2)), job_data(shop.base))
    release, refused = shop.leases.release, list[object]()

    def locked(*given: Any) -> None:
        if len(refused) < 3:
            refused.append(given)
            raise OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("database is locked"))
        release(*given)

    monkeypatch.setattr(shop.leases, "release", locked)
    settings = settings_of(tiny_base_dir, home=shop.home, device="cpu").to_json()
    timing = replace(FAST, hung=120.0, hindered=0.1)
    Worker(
        shop.home, shop.jobs, shop.leases, settings, command=without(LOCKED), timing=timing, has_peers=True
    )._work()
    assert len(refused) == 3
    assert (shop.jobs.get("job").status, num_stalled(shop.engine)) == (Status.QUEUED, 0)


@pytest.mark.parametrize(
    ("error", "reason", "what"),
    [
        (REFUSED, "the object store can't be reached, or refuses", "JobFiles.fetch"),
        (MOVED, "`latest` moved each time while it was measured", "JobFiles.fetch"),
        pytest.param(GONE, "its process can't use the database", "JobFiles.fetch", marks=pytest.mark.thorough),
        pytest.param(
            DATABASE_FULL, "its process can't use the database", "JobFiles.fetch", marks=pytest.mark.thorough
        ),
        pytest.param(LOCKED, "its process can't use the database", "JobFiles.fetch", marks=pytest.mark.thorough),
        pytest.param(FULL, "its worker's disk is full", "JobFiles.fetch", marks=pytest.mark.thorough),
        (FULL, "its worker's disk is full", "resolve_base"),
    ],
)
def test_job_without_room_is_requeued_with_a_reason(
    shop: Shop, tiny_base_dir: Path, error: str, reason: str, what: str
) -> None:
    """An attempt counts if no worker can ever have the space that the job needs."""
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2)), job_data(shop.base))
    checkpoints = shop.files.checkpoints("job")
    checkpoints.mkdir()
    settings = settings_of(tiny_base_dir, home=shop.home, device="cpu").to_json()
    timing = replace(FAST, hung=120.0, hindered=0.5)
    worker = Worker(
        shop.home, shop.jobs, shop.leases, settings, command=without(error, what), timing=timing, has_peers=True
    )
    start = time.monotonic()
    worker._work()
    assert time.monotonic() - start > 0.5, "it waits as well"
    num_counted = 1 if error == FULL else 0
    assert (shop.jobs.get("job").status, num_stalled(shop.engine)) == (Status.QUEUED, num_counted)
    messages = [event.message for event in shop.jobs.events("job")]
    assert messages[-2:] == [f"attempt 1: {reason}", "back in the queue"]
    assert checkpoints.exists()


def test_job_without_room_on_any_machine_fails(shop: Shop, tiny_base_dir: Path) -> None:
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2)), job_data(shop.base))
    settings = settings_of(tiny_base_dir, home=shop.home, device="cpu").to_json()
    timing = replace(FAST, hung=120.0, hindered=1000.0)
    Worker(shop.home, shop.jobs, shop.leases, settings, command=without(FULL), timing=timing)._work()
    assert (shop.jobs.get("job").status, shop.jobs.get("job").error) == (Status.FAILED, DISK_FULL)


def test_a_base_that_is_still_loaded_is_no_hang(shop: Shop, tiny_base_dir: Path) -> None:
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2)), job_data(shop.base))
    settings = settings_of(tiny_base_dir, home=shop.home, device="cpu").to_json()
    command = (sys.executable, "-c", LOADS_SLOWLY)
    Worker(shop.home, shop.jobs, shop.leases, settings, command=command, timing=replace(FAST, hung=120.0))._work()
    assert shop.jobs.get("job").error == "it said so"


def test_a_job_that_fails_says_how_far_it_got(shop: Shop, tiny_base_dir: Path) -> None:
    """Its usage is what it trained so far: its worker stored that a while ago, or never."""
    training = TrainingSpec(max_steps=6, learning_rate=1e20, batch_size=4, max_length=48, warmup_ratio=0.0)
    shop.submit(JobSpec("codes", lora=LoraSpec(rank=2), training=training), data := job_data(shop.base))
    settings = settings_of(tiny_base_dir, home=shop.home, device="cpu").to_json()
    timing = replace(FAST, hung=120.0, heartbeat=100.0)
    Worker(shop.home, shop.jobs, shop.leases, settings, timing=timing)._work()
    job = shop.jobs.get("job")
    assert (job.status, job.progress["step"]) == ("failed", 1), job.error
    assert 0 < cast("int", job.progress["tokens"]) <= data.train.num_tokens
    assert job.metrics["train_loss"] == shop.jobs.events("job")[-2].data["train_loss"]


def test_a_merge_leaves_the_weights_in_their_file(tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    """Unlike training, it needs no GPU."""
    settings = settings_of(tiny_base_dir, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(StartupError):
            _load(settings, JobSpec("trained"))
    base, library = _load(settings, spec_of({"a": 1.0}, Recipe("ties")))
    assert (base.device.type, base.dtype, library) == ("cpu", torch.float32, None)
    assert base.digest == tiny_base.digest


def test_a_job_keeps_to_its_share_of_the_gpu(tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    with fake_cuda() as card:
        base, _ = _load(settings_of(tiny_base_dir, device="cuda", train_memory=0.3), JobSpec("trained"))
        assert base.device.type == "cuda"
        assert card.memory_fraction == 0.3
    with fake_cuda() as card:
        _load(settings_of(tiny_base_dir, device="cuda"), JobSpec("trained"))
        assert card.memory_fraction == 1.0, "a worker elsewhere has what is free"


def test_published_adapters_are_packed(shop: Shop, tmp_path: Path) -> None:
    """For a server of this base, before the first request: trained and merged adapters."""
    native_library()
    lend_native(shop.home)
    base = tiny_of(tmp_path, "grouped")
    shop.submit(
        JobSpec("codes", lora=LoraSpec(rank=2), training=TrainingSpec(max_steps=1, max_length=48)), job_data(base)
    )
    settings = settings_of(base.directory, home=shop.home, device="cpu", native=True)
    worker = Worker(shop.home, shop.jobs, shop.leases, settings.to_json(), timing=replace(FAST, hung=120.0))
    worker._work()
    trained = shop.jobs.get("job")
    assert trained.status is Status.SUCCEEDED, (shop.home / "jobs" / "job" / "log.txt").read_text()
    assert trained.adapter is not None
    spec = merge_spec(shop.catalog, "codes*0.5", Recipe("svd", rank=1))
    shop.jobs.submit(spec, job_id="merge", data={ORIGIN: asdict(origin_of(shop.catalog, spec))})
    worker._work()
    merged = shop.jobs.get("merge")
    assert merged.status is Status.SUCCEEDED, (shop.home / "jobs" / "merge" / "log.txt").read_text()
    assert merged.adapter is not None
    served = PackedAdapters(shop.store, RowLayout(base.config.shape, ROW_FORMAT))
    for job in (trained, merged):
        assert job.adapter is not None
        digest = str(job.adapter["digest"])
        assert (shop.home / "adapters" / "packed" / digest).exists()
        assert isinstance(served.load(digest), PackedFile), "what was published had to be read"
        packed = served._layout.pack(shop.store.load(digest))
        content = (shop.home / "adapters" / "packed" / digest).read_bytes()
        assert content.endswith(packed.numpy().tobytes())
