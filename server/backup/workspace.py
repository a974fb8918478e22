"""A folder beside a file that is being made, which goes when that is done, however it ends."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.durable import UNFINISHED


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A new folder on the disk of `target`, for its owner alone. What killed processes left of theirs goes first.

    Raises OSError.
    """
    prefix = f"{UNFINISHED}for-{target.name}-"  # not as a restore's begins, whatever the target is called
    with _locked(target.parent):
        for path in target.parent.glob(f"{UNFINISHED}*"):
            if path.name.startswith(prefix) and (hold := _hold(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(hold)
        space = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        held = _hold(space)
    assert held is not None, "nobody else knows it"
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)
        os.close(held)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hold(folder: Path) -> int | None:
    """The handle of a lock on it, which ends with the process; None where another process has it."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
