"""Blobs: bytes under keys, which are names with slashes between them.

`Blobs` has two implementations: a directory of one machine (`Directory`), and a bucket that many machines use
(`adapters.storage.bucket`). The bucket needs the library obstore, which this module doesn't import.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from adapters.errors import SmoloraError
from adapters.storage.durable import UNFINISHED, new_file, sync


class Missing(SmoloraError):
    """The blob doesn't exist, or was deleted meanwhile."""


@dataclass(frozen=True)
class Stored:
    """A blob in a bucket. `key` is relative to the bucket's prefix. `modified` is a time by the store's clock."""

    key: str
    size: int  # in bytes
    modified: datetime


class Blobs(Protocol):
    """A store of blobs. If the store fails, a bucket raises BytesUnavailable, and a directory raises OSError."""

    def put(self, key: str, data: bytes) -> None:
        """Store the blob, durably. An existing blob with this key is replaced."""

    def get(self, key: str) -> bytes:
        """Return the blob's bytes. Raise Missing if there is no such blob."""

    def keys(self, prefix: str) -> list[str]:
        """Return all keys below the prefix, sorted. The prefix ends in a slash."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the blobs. Missing keys are ignored."""

    def reach(self, num_bytes: int) -> None:
        """Raise BytesUnavailable if a blob of `num_bytes` can't be written now.

        If `num_bytes` is 0, check instead that blobs can be deleted now.
        """

    def clean(self, prefix: str) -> None:
        """Remove half-written files of killed processes below the prefix. Nothing else may be writing there."""


class Directory:
    """Blobs as files below `root`, which needn't exist yet. After a crash, each file is whole or absent."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes) -> None:
        path = self._root / key
        self._make(path.parent)
        with new_file(path) as unfinished:
            unfinished.write_bytes(data)

    def get(self, key: str) -> bytes:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            raise Missing(f"there is no {key}") from None

    def keys(self, prefix: str) -> list[str]:
        return sorted(
            f"{Path(folder).relative_to(self._root).as_posix()}/{name}"
            for folder, _, names in os.walk(self._root / prefix, onerror=_raise)
            for name in names
            if not name.startswith(UNFINISHED)
        )

    def delete(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self._root / key
            path.unlink(missing_ok=True)
            folders.add(path.parent)
        for folder in folders:
            with suppress(FileNotFoundError):
                sync(folder)

    def reach(self, num_bytes: int) -> None:
        """Do nothing: a disk answers at once, so there is no need to check it in advance."""

    def clean(self, prefix: str) -> None:
        for path in (self._root / prefix).rglob(f"{UNFINISHED}*"):
            path.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Create the folder and its parents, and sync every folder that has a new entry."""
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            parent = folder.parent
            while parent != self._root.parent:
                sync(parent)
                parent = parent.parent


def _raise(error: OSError) -> None:
    """Raise `error`, an error from listing a folder, unless it says that the folder doesn't exist."""
    if not isinstance(error, FileNotFoundError):
        raise error
