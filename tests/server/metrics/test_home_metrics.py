"""Jobs, workers and the disk in /metrics."""

import logging
import shutil
import time
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.errors import StartupError
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.jobs.supervisor import own_name, present
from server.jobs.tables import Status
from server.metrics.home import HomeCollector
from server.operations.backup import back_up, stream
from tests.server.jobs.job_kit import submit

Samples = dict[tuple[str, str], float]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def read(collector: HomeCollector) -> Samples:
    """Return values by name and by the value of the only label."""
    return {
        (s.name, "".join(s.labels.values())): s.value for family in collector.collect() for s in family.samples
    }


def test_every_status_has_its_count(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    collector, clock = _collector(tmp_path, jobs)
    assert {read(collector)["smolora_jobs", status.value] for status in Status} == {0.0}
    for number in range(4):
        submit(jobs, f"job-{number}")
    assert leases.claim("somebody") is not None
    jobs.cancel("job-3")
    assert read(collector)["smolora_jobs", "queued"] == 0, "it is read once a second"
    clock.now += 1
    found = read(collector)
    assert {status.value: found["smolora_jobs", status.value] for status in Status} == {
        "queued": 2,
        "running": 1,
        "paused": 0,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 1,
    }


def test_the_oldest_job_that_waits_for_its_first_start(
    tmp_path: Path, jobs: Jobs, leases: Leases, database: sa.Engine
) -> None:
    collector, clock = _collector(tmp_path, jobs)
    assert read(collector)["smolora_oldest_queued_job_seconds", ""] == 0
    for number in range(3):
        submit(jobs, f"job-{number}")
    with database.begin() as connection:
        for number, minutes in ((0, 90), (1, 30)):
            connection.execute(
                sa.text("UPDATE jobs SET created_at = :at WHERE id = :id"),
                {
                    "at": f"{datetime.now(UTC) - timedelta(minutes=minutes):%Y-%m-%d %H:%M:%S.%f}",
                    "id": f"job-{number}",
                },
            )
    clock.now += 1
    assert read(collector)["smolora_oldest_queued_job_seconds", ""] == pytest.approx(90 * 60, abs=60)
    claim = leases.claim("somebody")  # job-0, which then gives way to others: it has begun
    assert claim is not None
    assert claim.job_id == "job-0"
    clock.now += 1
    assert read(collector)["smolora_oldest_queued_job_seconds", ""] == pytest.approx(30 * 60, abs=60)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_time_of_the_last_complete_backup(tmp_path: Path, jobs: Jobs, is_streamed: bool) -> None:
    collector, clock = _collector(tmp_path, jobs)
    assert read(collector)["smolora_last_backup_timestamp_seconds", ""] == 0
    with pytest.raises(StartupError):
        back_up(tmp_path, tmp_path / "nowhere" / "backup.tar")
    clock.now += 1
    assert read(collector)["smolora_last_backup_timestamp_seconds", ""] == 0
    started = time.time()
    if is_streamed:
        stream(tmp_path, BytesIO())
    else:
        back_up(tmp_path, tmp_path / "backup.tar")
    clock.now += 1
    assert started - 1 <= read(collector)["smolora_last_backup_timestamp_seconds", ""] <= time.time() + 1


def test_a_worker_is_busy_while_it_keeps_a_lease(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    collector, clock = _collector(tmp_path, jobs)
    assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (0, 0)
    with present(tmp_path):
        clock.now += 1
        assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (1, 0)
        submit(jobs, "job-1")
        claim = leases.claim(own_name())
        assert claim is not None
        clock.now += 1
        assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (0, 1)
    clock.now += 1
    assert read(collector)["smolora_workers", "busy"] == 0, "it has gone, whatever its lease says"


def test_workers_of_other_machines_count(tmp_path: Path, jobs: Jobs, leases: Leases) -> None:
    """In a cluster each process has its own HOME. A busy worker may run an older version, which isn't listed."""
    clock, elsewhere = Clock(), {"elsewhere:7", "elsewhere:8"}
    collector = HomeCollector(tmp_path, jobs, 512, clock, elsewhere=lambda: elsewhere)
    with present(tmp_path):
        submit(jobs, "job-1")
        assert leases.claim("elsewhere:7") is not None
        assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (2, 1)
        elsewhere.clear()
        clock.now += 1
        assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (1, 1)
    jobs.cancel("job-1")
    clock.now += 1
    assert (read(collector)["smolora_workers", "idle"], read(collector)["smolora_workers", "busy"]) == (0, 0)


def test_the_disk_is_homes(tmp_path: Path, jobs: Jobs) -> None:
    collector, _ = _collector(tmp_path, jobs)
    found = read(collector)
    assert found["smolora_disk_bytes", ""] == shutil.disk_usage(tmp_path).total
    assert 0 < found["smolora_disk_free_bytes", ""] < found["smolora_disk_bytes", ""]
    assert found["smolora_disk_min_free_bytes", ""] == 512


def test_unreadable_metrics_are_left_out_and_logged_once_a_minute(
    tmp_path: Path, jobs: Jobs, database: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    collector, clock = _collector(tmp_path, jobs)
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO lost")
    for _ in range(30):
        clock.now += 1
        assert {name for name, _ in read(collector)} == {
            "smolora_last_backup_timestamp_seconds",
            "smolora_disk_bytes",
            "smolora_disk_free_bytes",
            "smolora_disk_min_free_bytes",
        }
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1


def _collector(home: Path, jobs: Jobs) -> tuple[HomeCollector, Clock]:
    clock = Clock()
    return HomeCollector(home, jobs, 512, clock), clock
