"""Full disks: real ones, if this process may mount a file system, and faked ones."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

FILLING = "filling"


@contextmanager
def mounted(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system of that size at `place`. Skip the test if nothing can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "smolora-test", str(place)]
    ended = subprocess.run(mount, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no full disk to test on: {ended.stderr.strip() or 'mount failed'}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill the disk except for `leave` bytes (a multiple of 4,096), even if others free space meanwhile."""
    with open(disk / FILLING, "ab", buffering=0) as file:
        is_full = False
        while not is_full:
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(b"x" * size):
                        pass
            try:
                file.write(b"x")
            except OSError as error:
                is_full = error.errno == errno.ENOSPC
    os.truncate(disk / FILLING, (disk / FILLING).stat().st_size - leave)


def refuse_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make creating folders fail as on a full disk: on tmpfs, a new folder takes no space."""

    def mkdir(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)


def make_room(disk: Path) -> None:
    """Free the disk again."""
    (disk / FILLING).unlink()
