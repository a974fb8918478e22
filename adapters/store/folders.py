"""Folders of a store: locked, removed and measured."""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def hold(directory: Path, how: int) -> int | None:
    """The handle of a lock on the directory, which closing it ends; None where it isn't there, or is another's."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, how)
        if os.path.samestat(os.fstat(handle), os.stat(directory)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another; or removed while we waited
    os.close(handle)
    return None


def delete(paths: Iterable[Path]) -> None:
    """Remove files and folders, as far as that goes."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def size(place: Path) -> int:
    """The bytes of the folder's files. Raises OSError."""
    return sum(path.stat().st_size for path in place.iterdir())
