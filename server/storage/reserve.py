"""A file that only takes up space. On a full disk it is deleted, so that a few last writes succeed.

`spend_on` is for the writes that say why a job ended. The reserve is filled again once there is room.
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
_WAITS = (0.0, 0.1, 0.3, 1.0)  # seconds before each try: other processes may take released space

_Result = TypeVar("_Result")


class Reserve:
    """The reserve of one HOME. All processes that use the HOME use the same file."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / FILE_NAME

    def fill(self) -> bool:
        """Create the reserve file, unless it exists. Return whether it exists now."""
        if self._path.exists():
            return True
        if self._num_free < 2 * RESERVE_BYTES:
            return False
        remove_abandoned(self._home)
        try:
            with new_file(self._path) as unfinished:
                unfinished.write_bytes(os.urandom(RESERVE_BYTES))  # no file system can compress it
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Delete the reserve file."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def is_disk_full(self, error: BaseException) -> bool:
        """Return whether the error or one of its causes reports a full disk, or the disk is almost full."""
        return _says(error, _FULL, _FULL_WORDS) or self.is_needed

    @property
    def is_needed(self) -> bool:
        """Whether the disk is almost full."""
        return self._num_free < _TOO_LITTLE_BYTES

    @property
    def _num_free(self) -> int:
        return shutil.disk_usage(self._home).free

    def spend_on(self, work: Callable[[], _Result]) -> _Result:
        """Run `work`, which is short and idempotent, and return its result.

        If the disk is full, release the reserve and retry.
        """
        for wait in _WAITS:
            time.sleep(wait)
            try:
                return work()
            except SmoloraError:  # the result of `work`, not a failed write
                raise
            except Exception as error:
                if not self.is_disk_full(error):
                    raise
                self.release()
        return work()


def is_disk_failing(error: BaseException) -> bool:
    """Return whether the error or one of its causes reports a failing or read-only disk."""
    return _says(error, _FAILS, _FAILS_WORDS)


def is_database_locked(error: BaseException) -> bool:
    """Return whether the error or one of its causes reports a database that another process kept locked."""
    return _says(error, (), _LOCKED_WORDS)


def once_unlocked(work: Callable[[], _Result], goes_on: Callable[[], bool]) -> _Result:
    """Run `work`, and return its result. Retry while the database is locked and `goes_on()` is true."""
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
