"""The end of jobs' files: rows and checkpoints end with the job, all when somebody asks or they are old enough.

A job's record, events and card stay, as do the versions that it published and the data sets that it used. First
its record says that the files are gone, then they go: what a kill leaves of them, `sweep`,
`finish` and `prune` remove. Any number of processes may do any of it at once.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import Unavailable
from server.training.queue.job_files import JobFiles
from server.training.queue.jobs import Job, Jobs
from server.training.queue.reserve import Reserve
from server.training.queue.tables import Status

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket

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
