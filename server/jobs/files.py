"""Where a job's files are, HOME/jobs/<id>/, and the removal of those that nobody needs any more.

Rows and checkpoints are for a job that may run (again): they go once it has ended. Its model and log stay.

Where machines share a bucket it has them, but for the log, as copies of the folder `jobs/<id>`: `rows`,
`checkpoint-<token>-<step>` and `model-<token>`, none of which ever changes. HOME has what this machine works on.

Jobs' files in a bucket that machines share; `job_files.py` says which.

The end of jobs' files: rows and checkpoints end with the job, all when somebody asks or they are old enough.

A job's record, events and card stay, as do the versions that it published and the data sets that it used. First
its record says that the files are gone, then they go: what a kill leaves of them, `sweep`,
`finish` and `prune` remove. Any number of processes may do any of it at once.

Jobs that move with their HOME: what a copy of it must have for them, and how they go on in the copy.
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
from adapters.storage.bucket import Bucket
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import UNFINISHED, new_directory, remove_abandoned, remove_directory
from server.database.clock import database_time
from server.jobs import events as job_events
from server.jobs.jobs import Job, Jobs
from server.jobs.tables import Status, jobs, uses
from server.jobs.turns import is_over
from server.storage.home import DATA_NAME, TRAIN_NAME, VALIDATION_NAME, Home
from server.storage.reserve import Reserve

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

LOG_NAME = "log.txt"
CHECKPOINTS_NAME = "checkpoints"
MODEL_NAME = "model"
TRACEPARENT_NAME = "traceparent"
"""Of a job whose submission was traced: by which span."""

_ORPHAN_SECONDS = 3600.0

Statuses = Callable[[Sequence[str]], Mapping[str, Status]]
"""Those of any number of jobs, of the ones that there are."""


class JobFiles:
    """The folders of all jobs of one HOME, or of the bucket that has what is in it."""

    def __init__(self, home: Path, bucket: "Bucket | None" = None) -> None:
        self._root = Home(home).jobs
        self._shared = None if bucket is None else _shared(bucket)

    def directory(self, job_id: str) -> Path:
        return self._root / job_id

    def log(self, job_id: str) -> Path:
        """What the job's processes said, all attempts one after the other."""
        return self.directory(job_id) / LOG_NAME

    def checkpoints(self, job_id: str) -> Path:
        return self.directory(job_id) / CHECKPOINTS_NAME

    def model(self, job_id: str) -> Path:
        """What full fine-tuning made: a Hugging Face directory."""
        return self.directory(job_id) / MODEL_NAME

    def keep(self, job_id: str) -> None:
        """Have all machines find the rows that lie in the job's folder: before it is in the queue."""
        if self._shared is not None:
            self._shared.push_rows(job_id, self.directory(job_id))

    def fetch(self, job_id: str) -> None:
        """Have the job's rows in its folder, if it has any: before an attempt."""
        if self._shared is not None and not (self.directory(job_id) / DATA_NAME).exists():
            self._shared.fetch_rows(job_id, self.directory(job_id))

    def keep_model(self, job_id: str, token: int) -> None:
        """Have all machines find the model that an attempt made; where they share a bucket it is gone here."""
        if self._shared is not None:
            self._shared.push_model(job_id, token, self.model(job_id))
            # else nobody would remove it: others may be told to delete the job
            with suppress(OSError):
                remove_directory(self.model(job_id))

    def fetch_model(self, job_id: str) -> Path:
        """The model's directory; it isn't there where no attempt made one."""
        if self._shared is not None and not self.model(job_id).is_dir():
            self._shared.fetch_model(job_id, self.model(job_id))
        return self.model(job_id)

    def drop_rows(self, job_id: str) -> None:
        """For a job that has ended: it never runs again, and nobody else reads them. Raises BytesUnavailable."""
        self._unlink_rows(job_id)
        if self._shared is not None:
            self._shared.drop_rows(job_id)

    def drop_checkpoints(self, job_id: str) -> None:
        """For a job that has ended."""
        shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)
        if self._shared is not None:
            self._shared.drop_checkpoints(job_id)

    def stored(self) -> list[str]:
        """The jobs that have a folder."""
        here = {path.name for path in self._root.glob("*/")}
        return sorted(here if self._shared is None else here.union(self._shared.stored()))

    def num_bytes(self, job_id: str) -> int:
        """Of all that is stored of the job."""
        if self._shared is not None:
            return self._shared.num_bytes(job_id)
        total = 0
        for path in self.directory(job_id).rglob("*"):
            with suppress(FileNotFoundError):  # it is being removed
                total += path.stat().st_size if path.is_file() else 0
        return total

    def remove(self, job_id: str) -> None:
        """All of it, for a job whose record says so."""
        shutil.rmtree(self.directory(job_id), ignore_errors=True)
        if self._shared is not None:
            self._shared.remove(job_id)

    def sweep(self, statuses: Statuses) -> None:
        """As `sweep_ended`, and remove old folders of jobs never submitted, from HOME alone.

        Not those with a model: a database that doesn't know their jobs is another one, or was lost.
        """
        self.sweep_ended(statuses)
        folders = self._root.glob("*/")
        old = [path for path in folders if _is_old(path) and not (path / MODEL_NAME).exists()]
        known = statuses([path.name for path in old])  # last: one may just be submitted
        for directory in old:
            if directory.name not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def sweep_ended(self, statuses: Statuses) -> None:
        """Remove rows and checkpoints of jobs that have ended, and old halves of models, from HOME alone.

        Whoever cancels a job drops its rows, a worker the checkpoints of an attempt that it ends. These are what a
        kill left, and of jobs that ended otherwise, while no worker had them, or on another machine. A job that
        has ended never runs again, so nobody can need them; a process of it that is about to be killed may write
        one more checkpoint, which goes the next time.
        """
        names = [path.name for path in self._root.glob("*/") if _has_leftovers(path)]
        for job_id, status in statuses(names).items():
            if status.has_ended:
                self._unlink_rows(job_id)
                shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)
                remove_abandoned(self.directory(job_id))

    def sweep_shared(self, statuses: Statuses) -> None:
        """The same in the bucket, where there is one."""
        if self._shared is not None:
            self._shared.sweep(statuses, _ORPHAN_SECONDS)

    def _unlink_rows(self, job_id: str) -> None:
        for name in (DATA_NAME, TRAIN_NAME, VALIDATION_NAME):  # as long as the first is there all are
            with suppress(OSError):  # a sweep tries again
                (self.directory(job_id) / name).unlink(missing_ok=True)


def _shared(bucket: "Bucket") -> "SharedJobFiles":

    return SharedJobFiles(bucket)


def _has_leftovers(directory: Path) -> bool:
    """Whether it has any of what goes as its job ends."""
    names = (DATA_NAME, TRAIN_NAME, VALIDATION_NAME, CHECKPOINTS_NAME)
    return any((directory / name).exists() for name in names) or any(directory.glob(f"{UNFINISHED}*"))


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ORPHAN_SECONDS
    except FileNotFoundError:  # another worker was faster
        return False


CHECKPOINT = "checkpoint-"
ROWS = "rows"
MODEL, MODEL_MARK = "model-", "config.json"


class SharedJobFiles:
    """Those of all jobs. All of it raises BytesUnavailable."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket.under("jobs")
        self._rows = Copies(self._bucket, DATA_NAME)
        self._models = Copies(self._bucket, MODEL_MARK)

    def push_rows(self, job_id: str, directory: Path) -> None:
        """Upload what was just written into a new job's folder."""
        self._rows.push(job_id, directory, ROWS)

    def fetch_rows(self, job_id: str, directory: Path) -> None:
        """Write them there, `data.json` last; nothing where the job has none."""
        copy = next((copy for copy in self._rows.whole(job_id) if copy.id == ROWS), None)
        if copy is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=directory) as name:
            self._rows.fetch(copy, Path(name))
            for file in sorted(copy.files, key=lambda file: file == DATA_NAME):
                os.replace(Path(name) / file, directory / file)

    def push_model(self, job_id: str, token: int, directory: Path) -> None:
        """Upload what the attempt made."""
        self._models.push(job_id, directory, f"{MODEL}{token}")

    def fetch_model(self, job_id: str, directory: Path) -> None:
        """Write the last attempt's there; nothing where no attempt made one."""
        found = [copy for copy in self._models.whole(job_id) if copy.id.startswith(MODEL)]
        if found:
            last = max(found, key=lambda copy: int(copy.id.removeprefix(MODEL)))
            with new_directory(directory) as unfinished:
                self._models.fetch(last, unfinished)

    def drop_rows(self, job_id: str) -> None:
        """The job's."""
        self._rows.remove(copy for copy in self._rows.of(job_id) if copy.id == ROWS)

    def drop_checkpoints(self, job_id: str) -> None:
        """All of the job's."""
        self._rows.remove(copy for copy in self._rows.of(job_id) if copy.id.startswith(CHECKPOINT))

    def stored(self) -> list[str]:
        """The jobs that have any."""
        return self._bucket.folders()

    def num_bytes(self, job_id: str) -> int:
        """Of all of the job's."""
        return sum(stored.size for stored in self._bucket.listed(f"{job_id}/"))

    def remove(self, job_id: str) -> None:
        """All of the job's."""
        self._bucket.delete([stored.key for stored in self._bucket.listed(f"{job_id}/")])

    def sweep(self, statuses: Statuses, orphan_seconds: float) -> None:
        """As `JobFiles.sweep`; one listing of all jobs."""
        now = self._bucket.now()
        jobs: dict[str, list[Copy]] = {}
        for copy in self._rows.all():
            jobs.setdefault(copy.folder, []).append(copy)
        known = statuses(sorted(jobs))
        for job_id, copies in jobs.items():
            age = (now - max(copy.modified for copy in copies)).total_seconds()
            is_unwanted = known[job_id].has_ended if job_id in known else age > orphan_seconds
            if is_unwanted:
                self._rows.remove(copy for copy in copies if not copy.id.startswith(MODEL))


if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

_AT_ONCE = 500  # jobs of one query


@dataclass(frozen=True)
class Removal:
    """A job's files, and what they took up."""

    job_id: str
    num_bytes: int


class Retention:
    """The files of all jobs of one HOME, or of the bucket that has what is in it."""

    def __init__(self, home: Path, jobs: Jobs, bucket: "Bucket | None" = None) -> None:
        self._jobs = jobs
        self._files = JobFiles(home, bucket)
        self._here = JobFiles(home)
        self._reserve = Reserve(home)

    def cancel(self, job_id: str) -> Job:
        """End the job, whose rows go at once. Raises NotFound, Conflict."""
        job = self._jobs.cancel(job_id)
        with suppress(Unavailable):  # a sweep takes them
            self._files.drop_rows(job_id)
        return job

    def remove(self, job_id: str) -> int:
        """Remove an ended job's files, also on a full disk; their bytes. Raises NotFound, Conflict."""
        self._reserve.spend_on(lambda: self._jobs.remove_files(job_id))
        num_bytes = self._files.num_bytes(job_id)
        self._files.remove(job_id)
        self._reserve.fill()
        return num_bytes

    def prune(self, before: datetime, dry_run: bool = False) -> list[Removal]:
        """Remove the files of all jobs that ended before then, the oldest first; what went, or would go."""
        unfinished = self._jobs.without_files(self._files.stored())
        removals = []
        for job_id in [*unfinished, *self._jobs.with_files(before)]:
            num_bytes = self._files.num_bytes(job_id)
            if not dry_run:
                self.remove(job_id)
            removals.append(Removal(job_id, num_bytes))
        return removals

    def sweep(self) -> None:
        """Remove rows and checkpoints of ended jobs from HOME alone, old folders of jobs never submitted, and what
        is left of removed files.

        As servers and workers do: either may have a HOME without the other.
        """
        self._here.sweep(self._statuses)
        for job_id in self._jobs.without_files(self._here.stored()):
            self._here.remove(job_id)

    def finish(self) -> None:
        """Remove what is left of removed files, by who was killed or wrote on for a moment; fill the reserve."""
        for job_id in self._jobs.without_files(self._files.stored()):
            self._files.remove(job_id)
        self._files.sweep_shared(self._statuses)
        self._reserve.fill()

    def _statuses(self, job_ids: Sequence[str]) -> dict[str, Status]:
        found: dict[str, Status] = {}
        for start in range(0, len(job_ids), _AT_ONCE):
            standings = self._jobs.standings(job_ids[start : start + _AT_ONCE])
            found |= {job_id: standing.status for job_id, standing in standings.items()}
        return found


_ENDED = [status for status in Status if status.has_ended]


def used_by_unended(engine: sa.Engine) -> list[tuple[str, str]]:
    """Each job that hasn't ended with a digest of an adapter, or the id of a data set or file, that it needs."""
    query = sa.select(uses.c.job_id, uses.c.used).join(jobs, jobs.c.id == uses.c.job_id)
    with engine.connect() as connection:
        found = connection.execute(query.where(jobs.c.status.not_in(_ENDED)))
        return [(row.job_id, row.used) for row in found]


def with_folders(engine: sa.Engine) -> dict[str, Status]:
    """The jobs whose files weren't removed, and where each stands."""
    query = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.files_removed_at.is_(None))
    with engine.connect() as connection:
        return {row.id: Status(row.status) for row in connection.execute(query)}


def held(engine: sa.Engine) -> list[str]:
    """The jobs that a worker has just now: it may live, as far as its lease says."""
    is_kept = sa.not_(is_over(jobs.c.lease_until, database_time()))
    query = sa.select(jobs.c.id).where(jobs.c.status == Status.RUNNING, is_kept)
    with engine.connect() as connection:
        return list(connection.execute(query.order_by(jobs.c.number)).scalars())


def put_back(engine: sa.Engine, why: str) -> list[str]:
    """Let go of every job that a worker has, since that one has it elsewhere; their ids. `why` is told there.

    Each is claimable at once, whatever this machine's clock says of its lease, goes on from its newest checkpoint,
    and isn't charged for the time between. One that was to pause is paused.
    """
    with engine.begin() as connection:
        query = sa.select(jobs.c.id, jobs.c.wants_pause, jobs.c.stalled_attempts)
        running = connection.execute(query.where(jobs.c.status == Status.RUNNING).order_by(jobs.c.number)).all()
        for row in running:
            values = {
                "status": Status.PAUSED if row.wants_pause else Status.QUEUED,
                "wants_pause": False,
                "gives_way": False,
                "stalled_attempts": max(row.stalled_attempts - 1, 0),  # that attempt did nothing wrong
            }
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(values))
            job_events.append(connection, row.id, why)
        unended = jobs.c.status.not_in(_ENDED)
        connection.execute(sa.update(jobs).where(unended).values(lease_until=0.0, timed_at=None))
    return [row.id for row in running]
