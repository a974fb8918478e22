"""Files of ended jobs are removed automatically and repeatedly, whatever fails in between."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import pytest
from fastapi import FastAPI

from server.api.housekeeping import keep_house
from server.jobs.files import JobFiles, Removal, Retention
from server.jobs.jobs import Jobs
from server.training.spec import JobSpec

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def house_kept(retention: Retention, retain_days: float) -> AsyncIterator[None]:
    task = asyncio.create_task(keep_house(retention, retain_days, interval=0.01))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def end(jobs: Jobs, home: Path, job_id: str) -> Path:
    """Make an ended job; return its folder."""
    jobs.submit(JobSpec("codes"), job_id=job_id, data={})
    directory = JobFiles(home).directory(job_id)
    directory.mkdir(parents=True)
    (directory / "data.json").write_text("{}")
    jobs.cancel(job_id)
    return directory


async def test_again_and_again(tmp_path: Path, jobs: Jobs) -> None:
    first, waits = end(jobs, tmp_path, "j1"), tmp_path / "jobs" / "j0"
    jobs.submit(JobSpec("codes"), job_id="j0", data={})
    waits.mkdir()
    async with house_kept(Retention(tmp_path, jobs), 1e-9):
        await until(lambda: not first.exists())
        second = end(jobs, tmp_path, "j2")
        await until(lambda: not second.exists())
    assert waits.exists()


async def test_never_by_default(tmp_path: Path, jobs: Jobs) -> None:
    kept, removed = end(jobs, tmp_path, "j1"), end(jobs, tmp_path, "j2")
    jobs.remove_files("j2")  # and killed before they were removed
    async with house_kept(Retention(tmp_path, jobs), 0.0):
        await until(lambda: not removed.exists())
    assert kept.exists()
    assert jobs.get("j1").files_removed_at is None


async def test_not_before_their_time(tmp_path: Path, jobs: Jobs) -> None:
    kept, removed = end(jobs, tmp_path, "j1"), end(jobs, tmp_path, "j2")
    jobs.remove_files("j2")
    async with house_kept(Retention(tmp_path, jobs), 1.0):
        await until(lambda: not removed.exists())
    assert kept.exists()


class Unlucky(Retention):
    """A store that fails the first time."""

    has_failed = False

    def prune(self, before: datetime, dry_run: bool = False) -> list[Removal]:
        if not self.has_failed:
            self.has_failed = True
            raise OSError("the disk is away for a moment")
        return super().prune(before, dry_run)


async def test_a_fault_is_not_the_end(tmp_path: Path, jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    directory = end(jobs, tmp_path, "j1")
    async with house_kept(Unlucky(tmp_path, jobs), 1e-9):
        await until(lambda: not directory.exists())
    assert "cleanup failed" in caplog.text


async def test_leftover_uploads_are_removed_while_serving(app: FastAPI, tmp_path: Path) -> None:
    """A server restarts at once, when it is unknown whether a worker is still writing."""
    places = [tmp_path / "datasets", tmp_path / "files", tmp_path / "projects" / "acme" / "datasets"]
    old, new = ([place / f".unfinished-{age}" for place in places] for age in ("old", "new"))
    for half in (*old, *new):
        half.mkdir(parents=True)
    for half in old:
        os.utime(half, (0, 0))
    async with app.router.lifespan_context(app):
        await until(lambda: not any(half.exists() for half in old))
    assert all(half.exists() for half in new)
