"""Jobs' files: where they are, and what removes them.

A job's folder is HOME/jobs/<id>/. Its training rows and checkpoints are removed when the job ends, since the job
never runs again. If it failed or was cancelled, its model is removed, too. The model of a successful job and the
log stay until somebody removes the job's files, or until they are old enough. Even then, the job's record, events
and card, the versions that it published and the data sets that it used stay.

If there is a bucket, it has all of a job's files except the log, as immutable copies under `jobs/<id>`: `rows`,
`checkpoint-<token>-<step>` and `model-<token>`, where the token is that of the attempt's claim. HOME then has only
the files that this machine is working on.

The database first records that a job's files are removed; then they are removed. If the process is killed in
between, `sweep`, `finish` or `prune` removes the files later. Several processes may do this concurrently.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from adapters.errors import Unavailable
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import UNFINISHED, new_directory, remove_abandoned, remove_directory
from server.database.clock import database_time
from server.jobs import events as job_events
from server.jobs.jobs import Job, Jobs
from server.jobs.tables import ENDED, Status, jobs, uses
from server.jobs.turns import is_over
from server.storage.home import CHECKPOINT_COPY, MODEL_COPY, ROWS_COPY, Home
from server.storage.reserve import Reserve
from server.training.job_data import DATA_NAME, TEST_NAME, TRAIN_NAME, VALIDATION_NAME

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

LOG_NAME = "log.txt"
CHECKPOINTS_NAME = "checkpoints"
MODEL_NAME, MODEL_MARK = "model", "config.json"
TRACEPARENT_NAME = "traceparent"
"""The file with the traceparent of the span in which a traced job was submitted."""

_ROWS = (DATA_NAME, TRAIN_NAME, VALIDATION_NAME, TEST_NAME)  # only a crash leaves others without the first
_ORPHAN_SECONDS = 3600.0
_AT_ONCE = 500  # jobs per query
_WITHOUT_RESULT = (Status.FAILED, Status.CANCELLED)

Statuses = Callable[[Sequence[str]], Mapping[str, Status]]
"""A function that returns the status of each given job. Jobs that don't exist are left out."""


class JobFiles:
    """The folders of all jobs, in one HOME and in the bucket if there is one.

    Methods that use the bucket raise BytesUnavailable if the bucket can't be used.
    """

    def __init__(self, home: Path, bucket: "Bucket | None" = None) -> None:
        self._root = Home(home).jobs
        jobs_in_bucket = None if bucket is None else bucket.under("jobs")
        self._copies = Copies(jobs_in_bucket, DATA_NAME)
        self._models = Copies(jobs_in_bucket, MODEL_MARK)

    def directory(self, job_id: str) -> Path:
        return self._root / job_id

    def log(self, job_id: str) -> Path:
        """Return the path of the log, which has the output of all attempts one after the other."""
        return self.directory(job_id) / LOG_NAME

    def checkpoints(self, job_id: str) -> Path:
        return self.directory(job_id) / CHECKPOINTS_NAME

    def model(self, job_id: str) -> Path:
        """Return the directory of the model that full fine-tuning made, in Hugging Face's format."""
        return self.directory(job_id) / MODEL_NAME

    def keep(self, job_id: str) -> None:
        """Upload the job's training rows, if there is a bucket. Call this before the job is queued."""
        self._copies.push(job_id, self.directory(job_id), ROWS_COPY)

    def fetch(self, job_id: str) -> None:
        """Download the job's training rows from the bucket unless they are in its folder."""
        directory = self.directory(job_id)
        if (directory / DATA_NAME).exists():
            return
        for copy in self._copies.whole(job_id):
            if copy.id == ROWS_COPY:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=directory) as name:
                    self._copies.fetch(copy, Path(name))
                    # Move DATA_NAME last, since its presence marks the rows as complete.
                    for file in sorted(copy.files, key=lambda file: file == DATA_NAME):
                        os.replace(Path(name) / file, directory / file)

    def keep_model(self, job_id: str, token: int) -> None:
        """If there is a bucket, upload the model that an attempt made, then remove the model from this machine."""
        if self._models.push(job_id, self.model(job_id), f"{MODEL_COPY}{token}") is not None:
            with suppress(OSError):  # nothing else would remove it: another machine may delete the job
                remove_directory(self.model(job_id))

    def fetch_model(self, job_id: str) -> Path:
        """Return the model's directory.

        Download the model if necessary. If no attempt made a model, the directory doesn't exist.
        """
        model = self.model(job_id)
        if not model.is_dir():
            copies = {
                int(copy.id.removeprefix(MODEL_COPY)): copy
                for copy in self._models.whole(job_id)
                if copy.id.startswith(MODEL_COPY)
            }
            if copies:
                with new_directory(model) as unfinished:
                    self._models.fetch(copies[max(copies)], unfinished)
        return model

    def drop_rows(self, job_id: str) -> None:
        """Remove the training rows of a job that has ended, since the job never runs again."""
        self._unlink_rows(job_id)
        self._copies.remove(copy for copy in self._copies.of(job_id) if copy.id == ROWS_COPY)

    def drop_checkpoints(self, job_id: str) -> None:
        """Remove the checkpoints of a job that has ended."""
        shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)
        self._copies.remove(copy for copy in self._copies.of(job_id) if copy.id.startswith(CHECKPOINT_COPY))

    def drop_model(self, job_id: str) -> None:
        """Remove the model of a job that failed or was cancelled: it doesn't count, and nobody can download it."""
        shutil.rmtree(self.model(job_id), ignore_errors=True)
        self._copies.remove(copy for copy in self._copies.of(job_id) if copy.id.startswith(MODEL_COPY))

    def stored(self) -> list[str]:
        """Return the ids of the jobs that have a folder in HOME or in the bucket."""
        return sorted({path.name for path in self._root.glob("*/")}.union(self._copies.folders()))

    def num_bytes(self, job_id: str) -> int:
        """Return the total size of the job's files in the bucket, or in HOME if the bucket has none of them."""
        if copies := self._copies.of(job_id):
            return sum(copy.num_bytes for copy in copies)
        return size_of(self.directory(job_id))

    def remove(self, job_id: str) -> None:
        """Remove all files of a job. Before this, call `Jobs.remove_files`, which records the removal."""
        shutil.rmtree(self.directory(job_id), ignore_errors=True)
        self._copies.remove(self._copies.of(job_id))

    def sweep(self, statuses: Statuses) -> None:
        """Call `sweep_ended`, and remove from HOME the old folders of jobs that were never submitted.

        Folders with a model stay even if the database doesn't have the job: it may be the wrong database.
        """
        self.sweep_ended(statuses)
        folders = self._root.glob("*/")
        old = [path for path in folders if _is_old(path) and not (path / MODEL_NAME).exists()]
        known = statuses([path.name for path in old])  # asked last: a job may be submitted meanwhile
        for directory in old:
            if directory.name not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def sweep_ended(self, statuses: Statuses) -> None:
        """Remove the rows, checkpoints and unfinished model copies of ended jobs from HOME, not from the bucket.

        Also remove the models of jobs that failed or were cancelled.

        Usually a cancellation removes the job's rows, and the worker removes the checkpoints when the job ends.
        These files remain if a process was killed, or if the job ended on another machine or without a worker. The
        process of an ended job may write one more checkpoint before it is killed; the next sweep removes it.
        """
        names = [path.name for path in self._root.glob("*/") if _has_leftovers(path)]
        for job_id, status in statuses(names).items():
            if status.has_ended:
                self._unlink_rows(job_id)
                shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)
                remove_abandoned(self.directory(job_id))
            if status in _WITHOUT_RESULT:
                shutil.rmtree(self.model(job_id), ignore_errors=True)

    def sweep_bucket(self, statuses: Statuses) -> None:
        """Remove from the bucket the rows and checkpoints of ended jobs and, once old, of jobs never submitted.

        Also remove the models of jobs that failed or were cancelled.
        """
        jobs: dict[str, list[Copy]] = {}
        for copy in self._copies.all():
            jobs.setdefault(copy.folder, []).append(copy)
        if not jobs:
            return
        now, known = self._copies.now(), statuses(sorted(jobs))
        for job_id, copies in jobs.items():
            age = (now - max(copy.modified for copy in copies)).total_seconds()
            if known[job_id].has_ended if job_id in known else age > _ORPHAN_SECONDS:
                keeps_model = known.get(job_id) not in _WITHOUT_RESULT
                self._copies.remove(
                    copy for copy in copies if not (keeps_model and copy.id.startswith(MODEL_COPY))
                )

    def _unlink_rows(self, job_id: str) -> None:
        for name in _ROWS:
            with suppress(OSError):  # the next sweep tries again
                (self.directory(job_id) / name).unlink(missing_ok=True)


def size_of(directory: Path) -> int:
    """Return the total size of the files in a directory and its subdirectories."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # it is being removed
            total += path.stat().st_size if path.is_file() else 0
    return total


def _has_leftovers(directory: Path) -> bool:
    """Return whether a job's folder has files that may have to be removed when the job ends."""
    names = (*_ROWS, CHECKPOINTS_NAME, MODEL_NAME)  # the model if the job fails or is cancelled
    return any((directory / name).exists() for name in names) or any(directory.glob(f"{UNFINISHED}*"))


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ORPHAN_SECONDS
    except FileNotFoundError:  # another worker removed it
        return False


@dataclass(frozen=True)
class Removal:
    """A job whose files were removed (in a dry run: would be removed), and the total size of the files."""

    job_id: str
    num_bytes: int


class Retention:
    """Removes jobs' files from one HOME, and from the bucket if there is one."""

    def __init__(self, home: Path, jobs: Jobs, bucket: "Bucket | None" = None) -> None:
        self._jobs = jobs
        self._files = JobFiles(home, bucket)
        self._here = JobFiles(home)
        self._reserve = Reserve(home)

    def cancel(self, job_id: str) -> Job:
        """Cancel the job, and remove its training rows.

        Raise NotFound if there is no such job, and Conflict if it has ended.
        """
        job = self._jobs.cancel(job_id)
        with suppress(Unavailable):  # a sweep removes the rows later
            self._files.drop_rows(job_id)
        return job

    def remove(self, job_id: str) -> int:
        """Remove an ended job's files, even if the disk is full, and return their size.

        Raise NotFound if there is no such job, and Conflict if it hasn't ended.
        """
        # Recorded first: if this process is killed after this line, `finish` removes the files.
        self._reserve.spend_on(lambda: self._jobs.remove_files(job_id))
        num_bytes = self._files.num_bytes(job_id)
        self._files.remove(job_id)
        self._reserve.fill()
        return num_bytes

    def prune(self, before: datetime, dry_run: bool = False) -> list[Removal]:
        """Remove the files of all jobs that ended before `before`, and finish interrupted removals.

        In a dry run, only return what would be removed.
        """
        unfinished = self._jobs.without_files(self._files.stored())
        removals = []
        for job_id in [*unfinished, *self._jobs.with_files(before)]:
            num_bytes = self._files.num_bytes(job_id)
            if not dry_run:
                self.remove(job_id)
            removals.append(Removal(job_id, num_bytes))
        return removals

    def sweep(self) -> None:
        """Remove from HOME ended jobs' rows and checkpoints, folders without a job, and what interrupted removals
        left.

        Servers and workers call this, since a server and a worker may have different HOMEs.
        """
        self._here.sweep(self._statuses)
        for job_id in self._jobs.without_files(self._here.stored()):
            self._here.remove(job_id)

    def finish(self) -> None:
        """Finish interrupted removals, call `sweep_bucket`, and make the reserve file again if it was deleted.

        Also count the bytes of jobs that an older release made.

        The reserve file is deleted on a full disk, to make room for a few last writes.
        """
        for job_id in self._jobs.without_files(self._files.stored()):
            self._files.remove(job_id)
        self._files.sweep_bucket(self._statuses)
        for job_id in self._jobs.uncounted():
            self._jobs.count_bytes(job_id, self._files.num_bytes(job_id))
        self._reserve.fill()

    def _statuses(self, job_ids: Sequence[str]) -> dict[str, Status]:
        found: dict[str, Status] = {}
        for start in range(0, len(job_ids), _AT_ONCE):
            standings = self._jobs.standings(job_ids[start : start + _AT_ONCE])
            found |= {job_id: standing.status for job_id, standing in standings.items()}
        return found


def used_by_unended(engine: sa.Engine) -> list[tuple[str, str]]:
    """Return (job id, used) for unfinished jobs. `used` is an adapter's digest or the id of a data set or file."""
    query = sa.select(uses.c.job_id, uses.c.used).join(jobs, jobs.c.id == uses.c.job_id)
    with engine.connect() as connection:
        found = connection.execute(query.where(jobs.c.status.not_in(ENDED)))
        return [(row.job_id, row.used) for row in found]


def with_folders(engine: sa.Engine) -> dict[str, Status]:
    """Return the statuses of all jobs whose files weren't removed."""
    query = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.files_removed_at.is_(None))
    with engine.connect() as connection:
        return {row.id: Status(row.status) for row in connection.execute(query)}


def leased(engine: sa.Engine) -> list[str]:
    """Return the ids of running jobs whose leases haven't expired: their workers may be alive."""
    is_kept = sa.not_(is_over(jobs.c.lease_until, database_time()))
    query = sa.select(jobs.c.id).where(jobs.c.status == Status.RUNNING, is_kept)
    with engine.connect() as connection:
        return list(connection.execute(query.order_by(jobs.c.number)).scalars())


def requeue_running(engine: sa.Engine, reason: str) -> list[str]:
    """Requeue every running job after the database was copied, and return the jobs' ids.

    `reason` is the text of an event for each job. The jobs can be claimed at once, even if their leases haven't
    expired. A job resumes from its newest checkpoint. Nobody is charged for the time since the database was
    copied. If a job's pause was requested, the job is paused instead.
    """
    with engine.begin() as connection:
        query = sa.select(jobs.c.id, jobs.c.wants_pause, jobs.c.stalled_attempts)
        running = connection.execute(query.where(jobs.c.status == Status.RUNNING).order_by(jobs.c.number)).all()
        for row in running:
            values = {
                "status": Status.PAUSED if row.wants_pause else Status.QUEUED,
                "wants_pause": False,
                "gives_way": False,
                "stalled_attempts": max(row.stalled_attempts - 1, 0),  # the attempt didn't fail
            }
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(values))
            job_events.append(connection, row.id, reason)
        unended = jobs.c.status.not_in(ENDED)
        connection.execute(sa.update(jobs).where(unended).values(lease_until=0.0, timed_at=None))
    return [row.id for row in running]
