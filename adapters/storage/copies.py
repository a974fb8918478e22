"""Folders in a bucket, each perhaps in several copies, of which none ever changes.

    <id>/<copy>/<file>      a copy is there once it has its mark, the file that is written last

Each upload of a folder is a copy of its own, named at random. So whoever removes a copy that was looked at,
however late, can't take anything from one that was made since.
"""

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from adapters.storage.bucket import Bucket, Stored
from adapters.storage.durable import sync


@dataclass(frozen=True)
class Copy:
    """A copy of a folder: its files by name. `is_whole`: its mark was there."""

    folder: str
    id: str
    files: Mapping[str, Stored] = field(repr=False)
    is_whole: bool

    @property
    def num_bytes(self) -> int:
        return sum(stored.size for stored in self.files.values())

    @property
    def modified(self) -> datetime:
        """When its newest file came, by the store's clock."""
        return max(stored.modified for stored in self.files.values())


class Copies:
    """All copies of the folders in a bucket; `mark` is the name of the file that comes last."""

    def __init__(self, bucket: Bucket, mark: str) -> None:
        self._bucket = bucket
        self._mark = mark

    def of(self, folder: str) -> list[Copy]:
        """Those of one folder, the oldest first; half of one may be among them."""
        return _gathered(self._bucket.listed(f"{folder}/"), self._mark)

    def all(self) -> list[Copy]:
        """Those of all folders, each folder's oldest first."""
        return _gathered(self._bucket.listed(), self._mark)

    def whole(self, folder: str) -> list[Copy]:
        """Those that can be fetched, the oldest first."""
        return [copy for copy in self.of(folder) if copy.is_whole]

    def push(self, folder: str, directory: Path, copy: str | None = None, without: Collection[str] = ()) -> str:
        """Upload the directory's files, but for those named, as a copy; its id, which is `copy` where given."""
        copy = copy or secrets.token_hex(8)
        paths = (path for path in sorted(directory.iterdir()) if path.is_file())
        names = [path.name for path in paths if path.name not in (self._mark, *without)]
        for name in [*names, self._mark]:
            self._bucket.put_file(f"{folder}/{copy}/{name}", directory / name)
        return copy

    def fetch(self, copy: Copy, directory: Path, names: Iterable[str] | None = None) -> None:
        """Write the copy's files, or those named, into the directory, synced. Raises Missing, OSError."""
        for name, stored in copy.files.items():
            if names is None or name in names:
                with (directory / name).open("wb") as file:
                    self._bucket.copy_to(stored, file)
                sync(directory / name)
        sync(directory)

    def read(self, copy: Copy, name: str) -> bytes:
        """One of its files. Raises Missing."""
        return self._bucket.get(f"{copy.folder}/{copy.id}/{name}")

    def remove(self, copies: Iterable[Copy]) -> None:
        """Remove them, their marks first."""
        keys = [stored.key for copy in copies for stored in copy.files.values()]
        marks = [key for key in keys if key.endswith(f"/{self._mark}")]
        self._bucket.delete(marks)
        self._bucket.delete(key for key in keys if key not in marks)


def _gathered(listed: Iterable[Stored], mark: str) -> list[Copy]:
    found: dict[tuple[str, str], dict[str, Stored]] = {}
    for stored in listed:
        folder, copy, name = (*stored.key.split("/", 2), "", "")[:3]
        if name and "/" not in name:
            found.setdefault((folder, copy), {})[name] = stored
    copies = [Copy(folder, copy, files, mark in files) for (folder, copy), files in found.items()]
    return sorted(copies, key=lambda copy: (copy.folder, copy.modified, copy.id))
