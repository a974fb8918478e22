"""The reserved space for recording why a job failed, on a really full disk if one can be mounted."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from server.database import connect
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import Leases
from server.storage.reserve import DISK_FULL, FILE_NAME, RESERVE_BYTES, Reserve
from tests.kits.small_disk import fill, make_room, mounted
from tests.server.jobs.job_kit import submit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path, 4):
        yield tmp_path


def test_it_takes_space_once(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    assert reserve.fill()
    stamp = (tmp_path / FILE_NAME).stat().st_mtime_ns
    assert reserve.fill()
    assert (tmp_path / FILE_NAME).stat().st_mtime_ns == stamp
    assert (tmp_path / FILE_NAME).stat().st_size == RESERVE_BYTES
    reserve.release()
    reserve.release()
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_full_disk(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (full, OSError(errno.EDQUOT, "quota"), sqlite3.OperationalError("database or disk is full")):
        assert reserve.is_disk_full(error)
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert reserve.is_disk_full(wrapped)
    assert reserve.is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    assert not reserve.is_disk_full(OSError(errno.EACCES, "no"))
    assert not reserve.is_disk_full(sqlite3.OperationalError("database is locked"))


def test_work_gets_the_space_and_another_go(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    reserve.fill()

    def work() -> str:
        if (tmp_path / FILE_NAME).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return "done"

    assert reserve.spend_on(work) == "done"

    def other() -> None:
        raise OSError(errno.EACCES, "no")

    reserve.fill()
    with pytest.raises(PermissionError):
        reserve.spend_on(other)
    assert (tmp_path / FILE_NAME).exists()


def test_a_failure_is_recorded_on_a_full_disk(small_disk: Path) -> None:
    engine = connect(small_disk)
    jobs, leases, catalog, reserve = Jobs(engine), Leases(engine), Catalog(engine), Reserve(small_disk)
    catalog.publish("a", digest="0" * 64, rank=1, alpha=1, target_modules=(), parameters=1, bytes=1)
    submit(jobs, "j1")
    submit(jobs, "j2")
    assert reserve.fill()
    claim = leases.claim("w")
    assert claim is not None
    fill(small_disk)
    assert reserve.is_needed

    def write_much() -> None:
        for _ in range(10_000):  # until the log, whose pages are reused, would have to grow
            leases.add_event(claim, "x" * 1000)

    with pytest.raises(sa.exc.OperationalError) as caught:
        write_much()
    assert reserve.is_disk_full(caught.value)
    fill(small_disk)
    reserve.spend_on(lambda: leases.fail(claim, DISK_FULL))
    job = jobs.get("j1")
    assert (job.status, job.error) == (Status.FAILED, DISK_FULL)
    assert catalog.get("a").latest == 1
    fill(small_disk)
    assert not reserve.fill()
    assert not list(small_disk.glob("reserve*"))
    make_room(small_disk)
    assert reserve.fill()
    following = leases.claim("w")
    assert following is not None
    assert following.job_id == "j2"
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    engine.dispose()
