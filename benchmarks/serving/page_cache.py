"""Evicting files from the page cache, and timing reads."""

import os
import time
from pathlib import Path

_PAUSES = (0.0, 0.01, 0.1)
"""Seconds before each attempt to evict a file: pages in use by another process stay."""


def read_seconds(file: Path) -> float:
    """Return the seconds that reading the whole file into an allocated buffer takes."""
    buffer = bytearray(file.stat().st_size)
    with file.open("rb", buffering=0) as source:
        started = time.perf_counter()
        done = 0
        while read := source.readinto(memoryview(buffer)[done:]):
            done += read
        return time.perf_counter() - started


def drop(file: Path) -> bool:
    """Ask the system to evict the file from the page cache; return whether it did."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # dirty pages can't be evicted
        for pause in _PAUSES:
            time.sleep(pause)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not _is_cached(descriptor):
                return True
        return False
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int) -> bool:
    """Return whether the middle of the file can be read without waiting for the disk."""
    middle = os.fstat(descriptor).st_size // 2
    try:
        return os.preadv(descriptor, [bytearray(1)], middle, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
