"""A file that only takes up space, so that where the disk is full that much can still be written down.

`spend_on` is for the few writes that say why a job ended. The reserve is filled again once there is room.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from adapters.errors import SmoloraError
from adapters.storage.durable import new_file, remove_abandoned

FILE_NAME = "reserve"
RESERVE_BYTES = 1 << 20
DISK_FULL = "the disk is full: free some space under SMOLORA_HOME and submit the job again"

_TOO_LITTLE_BYTES = 1 << 16
_FULL_WORDS = ("database or disk is full", "no space left on device", "disk quota exceeded", "os error 28")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILS = (errno.EIO, errno.EROFS)
_FAILS_WORDS = (
    *("disk i/o error", "readonly database", "unable to open database file"),
    *("os error 5)", "os error 30)"),
)
_LOCKED_WORDS = ("database is locked",)
_WAITS = (0.0, 0.1, 0.3, 1.0)  # seconds: others may take what was released

_Result = TypeVar("_Result")


class Reserve:
    """The reserve of one HOME, which all its processes share."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / FILE_NAME

    def fill(self) -> bool:
        """Take up the space, unless that was done before. Whether it is there now."""
        if self._path.exists():
            return True
        if self._num_free < 2 * RESERVE_BYTES:
            return False
        remove_abandoned(self._home)
        try:
            with new_file(self._path) as unfinished:
                unfinished.write_bytes(os.urandom(RESERVE_BYTES))  # nothing that a file system could squeeze
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Give the space back."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def is_disk_full(self, error: BaseException) -> bool:
        """Whether the error, or one that led to it, says that there is no space, or there is hardly any."""
        return _says(error, _FULL, _FULL_WORDS) or self.is_needed

    @property
    def is_needed(self) -> bool:
        """Whether hardly anything can be written any more."""
        return self._num_free < _TOO_LITTLE_BYTES

    @property
    def _num_free(self) -> int:
        return shutil.disk_usage(self._home).free

    def spend_on(self, work: Callable[[], _Result]) -> _Result:
        """`work`, which is short and may be done again: where it fails for want of space, the reserve goes."""
        for wait in _WAITS:
            time.sleep(wait)
            try:
                return work()
            except SmoloraError:  # it did what it should
                raise
            except Exception as error:
                if not self.is_disk_full(error):
                    raise
                self.release()
        return work()


def is_disk_failing(error: BaseException) -> bool:
    """Whether the error, or one that led to it, says that the disk can't be read or written, full or not."""
    return _says(error, _FAILS, _FAILS_WORDS)


def is_database_locked(error: BaseException) -> bool:
    """Whether the error, or one that led to it, says that somebody else kept the file of the database too long."""
    return _says(error, (), _LOCKED_WORDS)


def once_unlocked(work: Callable[[], _Result], goes_on: Callable[[], bool]) -> _Result:
    """What `work` returns, which is done again while somebody else keeps the database locked, and `goes_on`."""
    while True:
        try:
            return work()
        except Exception as error:
            if not (is_database_locked(error) and goes_on()):
                raise


def _says(error: BaseException, numbers: Collection[int], words: Collection[str]) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in numbers:
            return True
        if any(text in str(cause).lower() for text in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
