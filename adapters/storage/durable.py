"""Files and directories that are there whole or not at all, wherever a process is killed or the power fails.

What is new is written beside its place, synced, and renamed; then the directory that names it is synced, too. It
belongs to its owner alone, whatever the umask, unless it `is_public`.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished-"
"""How the names of files and directories begin that are being written, or that a killed process left behind."""
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which such a thing is nobody's any more."""


def sync(path: Path) -> None:
    """Wait until a file's or a directory's content is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(target: Path, *, is_public: bool = False) -> Iterator[Path]:
    """Fill the file that this yields; on leaving it takes the place of `target`. Raises OSError.

    Where the block fails nothing stays of it, and `target` is what it was.
    """
    handle, name = tempfile.mkstemp(prefix=f"{UNFINISHED}{target.name}-", dir=target.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(_mode(is_public))
        sync(unfinished)
        unfinished.replace(target)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what is told
            unfinished.unlink(missing_ok=True)
        raise
    sync(target.parent)


@contextmanager
def new_directory(target: Path, *, is_public: bool = False) -> Iterator[Path]:
    """Fill the directory that this yields; on leaving it is renamed to `target`. Raises OSError.

    Where `target` has come to exist meanwhile it stays as it is, and what was written is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{target.name}-", dir=target.parent))
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            path.chmod(_mode(is_public, is_directory=path.is_dir()))  # writers leave modes of several kinds
            sync(path)
        unfinished.chmod(_mode(is_public, is_directory=True))
        sync(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        try:
            sync(target.parent)
        except OSError:
            if not unfinished.exists():  # ours took its place: take it back, since it may be gone with the power
                target.rename(unfinished)
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where the rename took it


def _mode(is_public: bool, *, is_directory: bool = False) -> int:
    if is_public:
        return 0o755 if is_directory else 0o644
    return 0o700 if is_directory else 0o600


def remove_directory(target: Path) -> None:
    """Remove it whole: it is out of sight by one rename, then deleted. Raises FileNotFoundError where it isn't.

    A full disk has room for that: nothing is made.
    """
    aside = target.with_name(f"{UNFINISHED}{os.urandom(4).hex()}")
    target.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(parent: Path, name: str) -> None:
    """Drop what killed processes left of `name`; only for one who knows that nobody is writing it now."""
    for directory in parent.glob(f"{UNFINISHED}{name}-*"):
        shutil.rmtree(directory, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Drop what killed processes left of anything, once it is old enough to be nobody's."""
    for path in parent.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """As text that a person can read, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
