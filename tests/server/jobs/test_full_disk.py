"""Checkpoints and publications on a disk that fills up: existing files stay whole, and failed writes leave
nothing."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.merge_recipe import Recipe
from adapters.store.store import AdapterStore
from server.database import connect
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Leases
from server.model.base.weights import BaseModel
from server.storage.reserve import DISK_FULL, Reserve
from server.training.checkpoint import Checkpoint, Checkpoints
from tests.kits.small_disk import fill, make_room, mounted
from tests.server.jobs.merge_kit import library_of, merge_now, merge_spec, publish, sample
from tests.server.jobs.test_merge_job import Listener

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path, 8):
        yield tmp_path


@pytest.fixture
def engine(disk: Path) -> Iterator[sa.Engine]:
    engine = connect(disk)
    yield engine
    engine.dispose()


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.full((5000,), float(step))}, {"best": step})


def fits(reserve: Reserve, work: Callable[[], object]) -> bool:
    """Return whether there was enough space. Other errors are raised."""
    try:
        work()
    except Exception as error:
        if not reserve.is_disk_full(error):
            raise
        return False
    return True


def test_a_checkpoint_is_there_whole_or_not_at_all(disk: Path) -> None:
    place = disk / "checkpoints"
    checkpoints = Checkpoints(place, 1)
    checkpoints.save(checkpoint(1))
    reserve = Reserve(disk)
    num_refused = 0
    while True:
        fill(disk, PAGE * num_refused)
        if fits(reserve, lambda: checkpoints.save(checkpoint(2))):
            break
        num_refused += 1
        assert [path.name for path in place.iterdir()] == ["1-1"]
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 1
        assert torch.equal(found.tensors["a"], checkpoint(1).tensors["a"])
        make_room(disk)
    assert num_refused >= 5  # 20,000 bytes of tensors
    assert [path.name for path in place.iterdir()] == ["1-2"]


def test_a_publication_is_there_whole_or_not_at_all(disk: Path, engine: sa.Engine, tiny_base: BaseModel) -> None:
    """Wherever it fails, the job's failure can be recorded, and the next start finds nothing to resume."""
    records = Records(disk / "adapters")
    jobs, leases, store = Jobs(engine), Leases(engine, records), AdapterStore(disk / "adapters")
    catalog, reserve = Catalog(engine, records), Reserve(disk)
    publish(catalog, store, "left", sample(tiny_base.config.shape, 1))
    publish(catalog, store, "right", sample(tiny_base.config.shape, 2))
    spec = merge_spec(catalog, "left*0.5+right", Recipe("ties", 0.5, seed=3))
    before = files(disk)
    num_refused = 0
    while True:
        assert reserve.fill()
        jobs.submit(spec, job_id=f"m{num_refused}", data={"total_steps": 21})
        claim = leases.claim("worker")
        assert claim is not None
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        fill(disk, 2 * PAGE * num_refused)
        work = partial(
            merge_now, spec, claim, leases, library_of(catalog, store, tiny_base), tiny_base, Listener()
        )
        if fits(reserve, work):
            break
        reserve.spend_on(partial(leases.fail, claim, DISK_FULL))
        job = jobs.get(f"m{num_refused}")
        assert (job.status, job.error, job.adapter) == (Status.FAILED, DISK_FULL, None)
        num_refused += 1
        make_room(disk)
        assert files(disk) == before, f"with {num_refused - 1} pages"
        assert catalog.recover(store.is_whole, jobs.is_known).lines() == ()
        assert [adapter.name for adapter in catalog.list()] == ["left", "right"]
    assert num_refused > 3
    assert catalog.get("merged").latest == 1
    store.verify(catalog.version("merged", 1).digest)


def files(disk: Path) -> list[str]:
    return sorted(str(path) for path in disk.glob("adapters/**/*") if path.is_file())
