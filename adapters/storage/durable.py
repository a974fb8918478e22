"""Files and directories that are whole or absent, whenever a process is killed or the power fails.

A new file is written under a temporary name, synced, and renamed; then its directory is synced, too. Unless
`is_public` is set, only its owner may read it, whatever the umask.
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
"""Prefix of files and directories that are being written, or that a killed process left behind."""
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which an unfinished file or directory counts as abandoned."""


def sync(path: Path) -> None:
    """Flush a file's or a directory's content to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(target: Path, *, is_public: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file to fill. On leaving, rename it to `target`. Raise OSError if the disk fails.

    If the block fails, the temporary file is removed, and `target` is unchanged.
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
        with suppress(OSError):  # the first error is the one to raise
            unfinished.unlink(missing_ok=True)
        raise
    sync(target.parent)


@contextmanager
def new_directory(target: Path, *, is_public: bool = False) -> Iterator[Path]:
    """Yield a temporary directory to fill. On leaving, rename it to `target`. Raise OSError if the disk fails.

    If `target` exists by then, it is unchanged, and the temporary directory is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{target.name}-", dir=target.parent))
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            path.chmod(_mode(is_public, is_directory=path.is_dir()))  # writers set various modes
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
            if not unfinished.exists():  # undo the rename, which may not survive a power failure
                target.rename(unfinished)
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # if it wasn't renamed


def _mode(is_public: bool, *, is_directory: bool = False) -> int:
    if is_public:
        return 0o755 if is_directory else 0o644
    return 0o700 if is_directory else 0o600


def remove_directory(target: Path) -> None:
    """Rename the directory, then delete it, so that no process sees it half-deleted. This works on a full disk.

    Raise FileNotFoundError if the directory doesn't exist.
    """
    aside = target.with_name(f"{UNFINISHED}{os.urandom(4).hex()}")
    target.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(parent: Path, name: str) -> None:
    """Remove the unfinished directories that `new_directory(parent / name)` left when its process was killed.

    Call this only if nothing else can be writing to such a directory.
    """
    for directory in parent.glob(f"{UNFINISHED}{name}-*"):
        shutil.rmtree(directory, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove unfinished files and directories in `parent` that are older than ABANDONED_AFTER."""
    for path in parent.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write indented JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
