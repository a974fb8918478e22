"""What the server does now and then, by itself: ended jobs lose rows, and all files where RETAIN_JOBS says so;
what killed processes left of uploads goes.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from anyio import to_thread

from server.jobs.files import Retention
from server.storage.places import Storage
from server.training.datasets import DatasetStore
from server.training.files import FileStore

INTERVAL_SECONDS = 3600.0

log = logging.getLogger("smolora.housekeeping")


async def keep_house(
    retention: Retention,
    retain_days: float,
    interval: float = INTERVAL_SECONDS,
    sweep: Callable[[], None] | None = None,
) -> None:
    """Look at once, and again each time so many seconds have passed; until cancelled.

    `sweep` is for what isn't the jobs': uploads, and adapters' bytes that were deleted a while ago.
    """
    while True:
        try:
            await to_thread.run_sync(_tidy, retention, retain_days)
            if sweep is not None:
                await to_thread.run_sync(sweep)
        except Exception:  # the disk, or the database: the next look may go well
            log.exception("can't tidy up just now")
        await asyncio.sleep(interval)


def clean_uploads(storage: Storage) -> None:
    """Drop what killed processes left of all projects' data sets and files, once it is old enough."""
    for project in storage.projects():
        datasets, files = storage.home.datasets(project), storage.home.files(project)
        DatasetStore(datasets, bucket=storage.at(datasets)).clean()
        FileStore(files, bucket=storage.at(files)).clean()


def _tidy(retention: Retention, retain_days: float) -> None:
    retention.sweep()
    retention.finish()
    if retain_days and (removals := retention.prune(datetime.now(UTC) - timedelta(days=retain_days))):
        num_bytes = sum(removal.num_bytes for removal in removals)
        log.info("removed the files of %d ended jobs, %d bytes", len(removals), num_bytes)
