"""A directory that appears under its name complete, or not at all, however the process ends."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"
"""The start of the names of directories that are being written, or that a killed process left behind."""


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Fill the directory that this yields; on leaving it is synced and renamed to `target`.

    Where `target` has come to exist meanwhile it stays as it is, and what was written is dropped. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{target.name}-", dir=target.parent))
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers leave 0600, which shuts other users out
            _sync(path)
        unfinished.chmod(0o755)
        _sync(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where the rename took it


def remove_unfinished(parent: Path, name: str) -> None:
    """Drop what killed processes left of `name`; only for one who knows that nobody is writing it now."""
    for directory in parent.glob(f"{UNFINISHED}{name}-*"):
        shutil.rmtree(directory, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """As text that a person can read, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
