"""Several files opened together: all of them, or none stays open."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO


def open_all(paths: Mapping[str, Path]) -> dict[str, BinaryIO]:
    """The files by the same names, to read and close. They outlive being removed. Raises OSError."""
    files: dict[str, BinaryIO] = {}
    with ExitStack() as opened:
        for name, path in paths.items():
            files[name] = opened.enter_context(path.open("rb"))
        opened.pop_all()
    return files
