"""Several files opened together: all of them, or none stays open.

A second form of stored adapters, as an engine wants them in its memory: a file each, to load them quickly.

    <root>/packed/<digest>

It is made of the first form and no more than a cache of this machine's: nothing copies it elsewhere, it goes with
the adapter's bytes, and where it lacks it is made again. What lies in a file, and whether it is sound, is for
whoever makes them to know.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch

from adapters.lora import LoraWeights
from adapters.peft.tensor_file import TensorFileError, map_file
from adapters.storage.durable import UNFINISHED, new_file, remove_abandoned


def open_all(paths: Mapping[str, Path]) -> dict[str, BinaryIO]:
    """The files by the same names, to read and close. They outlive being removed. Raises OSError."""
    files: dict[str, BinaryIO] = {}
    with ExitStack() as opened:
        for name, path in paths.items():
            files[name] = opened.enter_context(path.open("rb"))
        opened.pop_all()
    return files


Pieces = Sequence[memoryview]
"""A file's bytes, one piece after the other."""


_FREE_SHARE = 10


class PackedFiles:
    """The files under one store's root. Thread-safe; several processes may use one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "packed"
        self.make: Callable[[str, LoraWeights], Pieces | None] | None = None
        """What is kept of an adapter that is put, by its digest and weights; None where that isn't worth its room
        or has none (`has_room`), ValueError or RuntimeError where the adapter has no such form."""
        self.min_free_bytes = 0
        """That others need of the disk."""

    def add(self, weights: LoraWeights) -> None:
        """Keep what `make` makes of an adapter that was just stored, if anything, and if there is room."""
        if self.make is not None:
            with suppress(OSError, ValueError, RuntimeError):
                if (pieces := self.make(weights.digest, weights)) is not None:
                    self.keep(weights.digest, pieces)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a tenth of the disk would stay free beside a file of so many bytes and what others need.

        Raises OSError.
        """
        self._folder.mkdir(exist_ok=True)
        disk = shutil.disk_usage(self._folder)
        return disk.free - num_bytes >= self.min_free_bytes + disk.total // _FREE_SHARE

    def keep(self, digest: str, pieces: Pieces) -> None:
        """Have the file, whole or not at all. Raises OSError.

        Nothing where the adapter is gone, or there is no room.
        """
        if not self.has_room(sum(piece.nbytes for piece in pieces)):
            return
        with new_file(self._folder / digest) as unfinished, unfinished.open("wb") as file:
            file.writelines(pieces)
        if not self._has_bytes(digest):  # discarded meanwhile, perhaps before the file was there to go with it
            self.remove(digest)

    def open(self, digest: str) -> FileIO:
        """Open the file, which is then just used. Raises OSError, FileNotFoundError if there is none.

        Files are read and not mapped: an I/O error while a map is read would end the process (SIGBUS).
        """
        file = FileIO(self._folder / digest)
        try:
            os.utime(file.fileno())
        except BaseException:
            file.close()
            raise
        return file

    def contents(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each digest with its file's bytes, mapped, to be looked at: that isn't a use."""
        for path in sorted(self._folder.glob("*")):
            if not path.name.startswith(UNFINISHED):
                with suppress(OSError, RuntimeError, TensorFileError):
                    yield path.name, map_file(path)

    def remove(self, digest: str) -> None:
        """Nothing where there is none."""
        with suppress(OSError):
            (self._folder / digest).unlink(missing_ok=True)

    def facts(self, digest: str) -> tuple[float, int]:
        """When it was last used, and its bytes; zeros where there is none."""
        try:
            found = (self._folder / digest).stat()
        except OSError:
            return 0.0, 0
        return found.st_mtime, found.st_size

    def sweep(self) -> None:
        """Remove what killed processes left."""
        remove_abandoned(self._folder)
        for path in self._folder.glob("*"):
            if not (path.name.startswith(UNFINISHED) or self._has_bytes(path.name)):
                self.remove(path.name)

    def _has_bytes(self, digest: str) -> bool:
        return (self._root / digest[:2] / digest).is_dir()
