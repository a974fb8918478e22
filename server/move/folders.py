"""Folders of HOME, and the copies in a bucket that have the same files: uploads, and what jobs have.

Adapters are the stores' own (`adapters.store`). A job's log stays where it was written, as it does in a cluster.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from adapters.objects.copies import Copies, Copy
from adapters.viewpoint import DEFAULT_PROJECT
from server.errors import StartupError
from server.home import PROJECTS, Home
from server.move.needs import Needs
from server.training.data.datasets import FACTS as DATASET_FACTS
from server.training.data.files import FACTS as FILE_FACTS
from server.training.loop.checkpoint import STATE_NAME, Checkpoints
from server.training.queue.job_files import CHECKPOINTS_NAME, DATA_NAME, LOG_NAME, MODEL_NAME, JobFiles
from server.training.queue.shared_job_files import CHECKPOINT, MODEL, MODEL_MARK, ROWS

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket


@dataclass(frozen=True)
class Folder:
    """One of HOME, at `path`, and as a copy of the folder `name` below a bucket's `prefix`; `mark` is last there.

    `copy` is the copy's id; None: any.
    """

    path: str
    prefix: str
    name: str
    mark: str
    copy: str | None = None

    def push(self, home: Path, bucket: "Bucket") -> None:
        """Upload it, and compare what is there then. Raises StartupError."""
        copies = Copies(bucket.under(self.prefix), self.mark)
        copy = copies.push(self.name, home / self.path, self.copy, without=(LOG_NAME,))
        self._compare(home, bucket, next(found for found in copies.whole(self.name) if found.id == copy))

    def fetch(self, home: Path, bucket: "Bucket") -> None:
        """Write it below `home`, and compare. Raises StartupError, Missing, OSError."""
        copies = Copies(bucket.under(self.prefix), self.mark)
        copy = next(found for found in copies.whole(self.name) if self.copy in (None, found.id))
        (home / self.path).mkdir(parents=True, exist_ok=True)
        copies.fetch(copy, home / self.path)
        self._compare(home, bucket, copy)

    def _compare(self, home: Path, bucket: "Bucket", copy: Copy) -> None:
        for name, stored in copy.files.items():
            there = _Digest()
            bucket.under(self.prefix).copy_to(stored, cast("BinaryIO", there))
            with open(home / self.path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != there.digest.digest():
                    raise StartupError(f"{self.path}/{name} isn't the same in the object store: run it again")


def uploads_of(home: Home) -> list[Folder]:
    """Data sets and files, of all projects."""
    found = []
    for project in home.projects():
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            prefix = root.relative_to(home.path).as_posix()
            names = sorted(path.parent.name for path in root.glob(f"*/{mark}") if path.parent.name[0] != ".")
            found += _uploads(prefix, names, mark)
    return found


def uploads_in(bucket: "Bucket") -> list[Folder]:
    """The same, of a bucket."""
    home, found = Home(Path()), []
    for project in [DEFAULT_PROJECT, *bucket.under(PROJECTS).folders()]:
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            copies = Copies(bucket.under(root.as_posix()), mark).all()
            found += _uploads(root.as_posix(), sorted({copy.folder for copy in copies if copy.is_whole}), mark)
    return found


def jobs_of(home: Home, needs: Needs) -> Iterator[Folder]:
    """Rows, models, and of those that haven't ended the checkpoints."""
    files = JobFiles(home.path)
    for job_id, status in needs.jobs.items():
        place = files.directory(job_id).relative_to(home.path).as_posix()
        if (files.directory(job_id) / DATA_NAME).exists():
            yield _rows(place, job_id)
        if (files.model(job_id) / MODEL_MARK).exists():
            yield _model(place, job_id, f"{MODEL}0")  # older than any that is made there
        if not status.has_ended:
            for token, step, _ in Checkpoints(files.checkpoints(job_id), 0).stored():
                yield _checkpoint(place, job_id, f"{token}-{step}")


def jobs_in(bucket: "Bucket", needs: Needs) -> Iterator[Folder]:
    """The same, of a bucket."""
    shared = bucket.under("jobs")
    for job_id, status in needs.jobs.items():
        place = f"jobs/{job_id}"
        if any(copy.id == ROWS for copy in Copies(shared, DATA_NAME).whole(job_id)):
            yield _rows(place, job_id)
        models = [copy.id for copy in Copies(shared, MODEL_MARK).whole(job_id) if copy.id.startswith(MODEL)]
        if models:
            yield _model(place, job_id, max(models, key=lambda name: int(name.removeprefix(MODEL))))
        if not status.has_ended:
            for copy in Copies(shared, STATE_NAME).whole(job_id):
                if copy.id.startswith(CHECKPOINT):
                    yield _checkpoint(place, job_id, copy.id.removeprefix(CHECKPOINT))


def _uploads(prefix: str, names: Sequence[str], mark: str) -> list[Folder]:
    return [Folder(f"{prefix}/{name}", prefix, name, mark) for name in names]


def _rows(place: str, job_id: str) -> Folder:
    return Folder(place, "jobs", job_id, DATA_NAME, ROWS)


def _model(place: str, job_id: str, copy: str) -> Folder:
    return Folder(f"{place}/{MODEL_NAME}", "jobs", job_id, MODEL_MARK, copy)


def _checkpoint(place: str, job_id: str, name: str) -> Folder:
    return Folder(f"{place}/{CHECKPOINTS_NAME}/{name}", "jobs", job_id, STATE_NAME, f"{CHECKPOINT}{name}")


class _Digest:
    """Hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        return len(piece)
