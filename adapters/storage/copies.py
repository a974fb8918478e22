"""Folders in a bucket, each in any number of copies. A copy never changes.

    <folder>/<copy>/<file>      a copy is whole once it has its mark, the file that is written last

Each upload makes a copy with a random id, unless the caller chooses the id. So a process that lists copies, and
removes them much later, can't remove a copy that was uploaded in between.
"""

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.storage.blobs import Stored
from adapters.storage.durable import sync

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket


@dataclass(frozen=True)
class Copy:
    """A copy of a folder, as listed. `files` has its files by name.

    `is_whole` is false if the mark, which is uploaded last, was missing.
    """

    folder: str
    id: str
    files: Mapping[str, Stored] = field(repr=False)
    is_whole: bool

    @property
    def num_bytes(self) -> int:
        return sum(stored.size for stored in self.files.values())

    @property
    def modified(self) -> datetime:
        """The time of the copy's newest file, by the store's clock."""
        return max(stored.modified for stored in self.files.values())


class Copies:
    """All copies of the folders in a bucket. A copy is whole once it has the file `mark`, which is uploaded last.

    If `bucket` is None, there are no copies, and `push` does nothing: the folders are only on this machine.
    """

    def __init__(self, bucket: "Bucket | None", mark: str) -> None:
        self._bucket = bucket
        self._mark = mark

    def of(self, folder: str) -> list[Copy]:
        """Return the folder's copies, the oldest first, including incomplete ones."""
        return self._gathered(f"{folder}/")

    def all(self) -> list[Copy]:
        """Return the copies of all folders, ordered by folder and age, including incomplete ones."""
        return self._gathered("")

    def whole(self, folder: str) -> list[Copy]:
        """Return the folder's complete copies, the oldest first."""
        return [copy for copy in self.of(folder) if copy.is_whole]

    def folders(self) -> list[str]:
        """Return the names of all folders."""
        return [] if self._bucket is None else self._bucket.folders()

    def now(self) -> datetime:
        """Return the time by the clock that `Copy.modified` uses."""
        return datetime.now(UTC) if self._bucket is None else self._bucket.now()

    def push(
        self, folder: str, directory: Path, copy: str | None = None, without: Collection[str] = ()
    ) -> str | None:
        """Upload the directory's files, except those named in `without`, as a new copy.

        Return the copy's id, which is `copy` if given, or None if there is no bucket.
        """
        if self._bucket is None:
            return None
        copy = copy or secrets.token_hex(8)
        paths = (path for path in sorted(directory.iterdir()) if path.is_file())
        names = [path.name for path in paths if path.name not in (self._mark, *without)]
        for name in [*names, self._mark]:
            self._bucket.put_file(f"{folder}/{copy}/{name}", directory / name)
        return copy

    def fetch(self, copy: Copy, directory: Path) -> None:
        """Download the copy's files into the directory, and sync them to disk.

        Raise Missing if a file was deleted from the bucket, or OSError if the directory can't be written.
        """
        for name, stored in copy.files.items():
            with (directory / name).open("wb") as file:
                self._of_copies.copy_to(stored, file)
            sync(directory / name)
        sync(directory)

    def read(self, copy: Copy, name: str) -> bytes:
        """Return the content of one of the copy's files. Raise Missing if the file was deleted."""
        return self._of_copies.get(f"{copy.folder}/{copy.id}/{name}")

    def remove(self, copies: Iterable[Copy]) -> None:
        """Delete the copies. Their marks are deleted first, so that no incomplete copy seems whole."""
        keys = [stored.key for copy in copies for stored in copy.files.values()]
        if keys:
            mark = f"/{self._mark}"
            self._of_copies.delete(key for key in keys if key.endswith(mark))
            self._of_copies.delete(key for key in keys if not key.endswith(mark))

    @property
    def _of_copies(self) -> "Bucket":
        assert self._bucket is not None, "there is no copy without a bucket"
        return self._bucket

    def _gathered(self, prefix: str) -> list[Copy]:
        found: dict[tuple[str, str], dict[str, Stored]] = {}
        for stored in [] if self._bucket is None else self._bucket.listed(prefix):
            folder, copy, name = (*stored.key.split("/", 2), "", "")[:3]
            if name and "/" not in name:
                found.setdefault((folder, copy), {})[name] = stored
        copies = [Copy(folder, copy, files, self._mark in files) for (folder, copy), files in found.items()]
        return sorted(copies, key=lambda copy: (copy.folder, copy.modified, copy.id))
