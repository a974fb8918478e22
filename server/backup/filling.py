"""Fills an empty HOME: with all of it, or nothing.

What it is to have is collected in a folder in HOME; then its parts are renamed into their places, the database
last, and the folder goes. Until then no command works on that HOME, and the next one to fill it clears what one
that was killed has left.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.durable import sync
from server.database import FILE_NAME
from server.errors import StartupError
from server.home import LOCK_NAME, RESTORING, make, serving

_PARTS = ("adapters", "datasets", "files", "jobs", "keyed", "projects")
_OTHERS = frozenset({LOCK_NAME, "lost+found"})  # the latter is a new file system's


@contextmanager
def filled(home: Path) -> Iterator[Path]:
    """A folder whose parts are those of `home` once the block has ended. Nothing stays of a block that fails.

    Raises StartupError where `home` is there and not empty, or served; OSError.
    """
    is_new = not home.exists()
    try:
        make(home, to_restore=True)
        with serving(home):
            _clear(home)
            staging = Path(tempfile.mkdtemp(prefix=RESTORING, dir=home))
            try:
                yield staging
                _put_in_place(staging, home)
            except BaseException:
                _clear(home)
                raise
    finally:
        if is_new and {path.name for path in home.glob("*")} <= {LOCK_NAME}:
            shutil.rmtree(home, ignore_errors=True)


def _clear(home: Path) -> None:
    """Remove what was put there by one that was cut off. StartupError where there is anything else."""
    if any(home.glob(f"{RESTORING}*")):
        moved = [home / name for name in _PARTS] + list(home.glob(f"{FILE_NAME}*"))
        for path in [*moved, *home.glob(f"{RESTORING}*")]:  # in this order: the mark goes last
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if others := sorted(path.name for path in home.iterdir() if path.name not in _OTHERS):
        named = ", ".join(others[:3])
        raise StartupError(f"{home} isn't empty, it has {named}: give another --home or SMOLORA_HOME")


def _put_in_place(staging: Path, home: Path) -> None:
    names = sorted(path.name for path in staging.iterdir())
    for name in [*(name for name in names if name != FILE_NAME), FILE_NAME]:
        (staging / name).rename(home / name)
    sync(home)
    staging.rmdir()
    sync(home)
