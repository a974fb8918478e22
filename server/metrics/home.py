"""Metrics of HOME: jobs, workers, disk space, and the last backup.

They are read at most once a second, however often gateways request them. If something can't be read in time, its
metrics are omitted, and a warning is logged: the other metrics are needed most when a disk or the database fails.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.jobs.jobs import Jobs
from server.jobs.supervisor import workers_of
from server.jobs.tables import Status
from server.metrics.aside import Aside
from server.storage.home import Home

_KEEP_SECONDS = 1.0
_QUIET_SECONDS = 60.0  # between two log lines about the same fault

log = logging.getLogger("smolora.metrics")


class HomeCollector(Collector):
    """Metrics of one HOME. `min_free_bytes` is the setting of that name. Not thread-safe."""

    def __init__(
        self,
        home: Path,
        jobs: Jobs,
        min_free_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        elsewhere: Callable[[], set[str]] | None = None,
    ) -> None:
        """`elsewhere` returns the names of all machines' workers. If it is None, only this HOME has workers."""
        self._home = home
        self._jobs = jobs
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._elsewhere = elsewhere
        self._aside = Aside()
        self._read_at = float("-inf")
        self._said_at = float("-inf")
        self._families: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        if self._clock() - self._read_at >= _KEEP_SECONDS:
            self._families = [
                *self._tried(partial(self._aside.run, lambda: list(self._of_jobs()))),
                *self._tried(self._of_disk),
            ]
            self._read_at = self._clock()
        return self._families

    def _tried(self, read: Callable[[], Iterable[Metric]]) -> list[Metric]:
        try:
            return list(read())
        except Exception as error:  # the database or the disk fails
            if self._clock() - self._said_at >= _QUIET_SECONDS:
                self._said_at = self._clock()
                log.warning("metrics of HOME can't be read: %s", type(error).__name__)
            return []

    def _of_jobs(self) -> Iterator[Metric]:
        counts = self._jobs.counts()
        jobs = GaugeMetricFamily("smolora_jobs", "Trainings, merges and evaluations, by status", labels=["status"])
        for status in Status:
            jobs.add_metric([status.value], counts.get(status, 0))
        yield jobs
        oldest = self._jobs.oldest_queued()
        age = 0.0 if oldest is None else max(0.0, (datetime.now(UTC) - oldest).total_seconds())
        text = "Age of the oldest queued job that waits for its first start; 0: there is none"
        yield GaugeMetricFamily("smolora_oldest_queued_job_seconds", text, value=age)
        busy, living = self._jobs.owners(), set(workers_of(self._home))
        if self._elsewhere is not None:  # a worker of an older version is known only while it is busy
            living |= busy | self._elsewhere()
        states = Counter("busy" if worker in busy else "idle" for worker in living)
        workers = GaugeMetricFamily("smolora_workers", "Worker processes that live, by state", labels=["state"])
        for state in ("busy", "idle"):
            workers.add_metric([state], states[state])
        yield workers

    def _of_disk(self) -> Iterator[Metric]:
        usage = shutil.disk_usage(self._home)
        at = 0.0
        with suppress(FileNotFoundError):
            at = Home(self._home).backed_up.stat().st_mtime
        text = "Time of the last complete `smolora backup`, in seconds since 1970; 0: there was none"
        yield GaugeMetricFamily("smolora_last_backup_timestamp_seconds", text, value=at)
        yield GaugeMetricFamily("smolora_disk_bytes", "Size of HOME's disk", value=usage.total)
        yield GaugeMetricFamily("smolora_disk_free_bytes", "Free space on HOME's disk", value=usage.free)
        text = "Free space that uploads and jobs leave (SMOLORA_MIN_FREE_BYTES)"
        yield GaugeMetricFamily("smolora_disk_min_free_bytes", text, value=self._min_free_bytes)
