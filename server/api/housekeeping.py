"""Periodic cleanup of ended jobs' files, and of partial uploads that killed processes left behind.

A job's rows are removed once it has ended. Its other files are removed after RETAIN_JOBS days, if that is set.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from anyio import to_thread

from server.jobs.files import Retention
from server.storage.places import Storage
from server.training.files import RowSources

INTERVAL_SECONDS = 3600.0

log = logging.getLogger("smolora.housekeeping")


async def keep_house(
    retention: Retention,
    retain_days: float,
    interval: float = INTERVAL_SECONDS,
    sweep: Callable[[], None] | None = None,
) -> None:
    """Clean up now and every `interval` seconds, until cancelled.

    `sweep` cleans up everything that doesn't belong to a job, such as uploads and the bytes of deleted adapters.
    """
    while True:
        try:
            await to_thread.run_sync(_clean_jobs, retention, retain_days)
            if sweep is not None:
                await to_thread.run_sync(sweep)
        except Exception:  # an error of the disk or the database, which may work the next time
            log.exception("cleanup failed")
        await asyncio.sleep(interval)


def clean_uploads(storage: Storage) -> None:
    """Remove partial uploads of data sets and files, of all projects, that killed processes left behind."""
    for project in storage.projects():
        sources = RowSources.of(storage, project)
        sources.datasets.clean()
        sources.files.clean()


def _clean_jobs(retention: Retention, retain_days: float) -> None:
    retention.sweep()
    retention.finish()
    if retain_days and (removals := retention.prune(datetime.now(UTC) - timedelta(days=retain_days))):
        num_bytes = sum(removal.num_bytes for removal in removals)
        log.info("removed the files of %d ended jobs, %d bytes", len(removals), num_bytes)
