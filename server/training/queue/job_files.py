"""Where a job's files are, HOME/jobs/<id>/, and the removal of those that nobody needs any more."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from server.home import Home
from server.training.queue.tables import Status

LOG_NAME = "log.txt"
CHECKPOINTS_NAME = "checkpoints"
MODEL_NAME = "model"
TRACEPARENT_NAME = "traceparent"
"""Of a job whose submission was traced: by which span."""

_ORPHAN_SECONDS = 3600.0


class JobFiles:
    """The folders of all jobs of one HOME."""

    def __init__(self, home: Path) -> None:
        self._root = Home(home).jobs

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

    def drop_checkpoints(self, job_id: str) -> None:
        """For a job that has ended."""
        shutil.rmtree(self.checkpoints(job_id), ignore_errors=True)

    def stored(self) -> list[str]:
        """The jobs that have a folder."""
        return sorted(path.name for path in self._root.glob("*/"))

    def num_bytes(self, job_id: str) -> int:
        """Of all that is stored of the job."""
        total = 0
        for path in self.directory(job_id).rglob("*"):
            with suppress(FileNotFoundError):  # it is being removed
                total += path.stat().st_size if path.is_file() else 0
        return total

    def remove(self, job_id: str) -> None:
        """All of it, for a job whose record says so."""
        shutil.rmtree(self.directory(job_id), ignore_errors=True)

    def sweep(self, status: Callable[[str], Status | None]) -> None:
        """Remove checkpoints of jobs that have ended, and old folders of jobs that were never submitted."""
        for directory in self._root.glob("*/"):
            found = status(directory.name)
            if found is not None and found.has_ended:
                self.drop_checkpoints(directory.name)
            elif found is None and _is_old(directory):
                shutil.rmtree(directory, ignore_errors=True)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ORPHAN_SECONDS
    except FileNotFoundError:  # another worker was faster
        return False
