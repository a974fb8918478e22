"""Where a job's files are, HOME/jobs/<id>/, and the removal of those that nobody needs any more.

Rows and checkpoints are for a job that may run (again): they go once it has ended. Its model and log stay.

Where machines share a bucket it has them, but for the log, as copies of the folder `jobs/<id>`: `rows`,
`checkpoint-<token>-<step>` and `model-<token>`, none of which ever changes. HOME has what this machine works on.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.durable import UNFINISHED, remove_abandoned, remove_directory
from server.home import Home
from server.training.queue.tables import Status

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket
    from server.training.queue.shared_job_files import SharedJobFiles

LOG_NAME = "log.txt"
CHECKPOINTS_NAME = "checkpoints"
MODEL_NAME = "model"
DATA_NAME = "data.json"
"""Is written last of a job's rows."""
TRAIN_NAME, VALIDATION_NAME = "train.safetensors", "validation.safetensors"
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
    from server.training.queue.shared_job_files import SharedJobFiles

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
