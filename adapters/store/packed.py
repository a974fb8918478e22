"""A second form of stored adapters, which loads fast: one file per adapter, in an engine's memory layout.

    <root>/packed/<digest>

The files are a cache on this machine, made from PEFT's files. They are removed with the adapter's bytes, and made
again if missing. The caller that makes them (`PackedFiles.make`) defines their content, and must check it.
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
    """Open all files, and return them by the names in `paths`. Raise OSError if one can't be opened.

    Open files stay readable after they are removed from disk.
    """
    files: dict[str, BinaryIO] = {}
    with ExitStack() as opened:
        for name, path in paths.items():
            files[name] = opened.enter_context(path.open("rb"))
        opened.pop_all()
    return files


Pieces = Sequence[memoryview]
"""A file's bytes, one piece after the other."""

_FREE_SHARE = 10  # a tenth of the disk stays free


class PackedFiles:
    """The packed files under one store's root. Thread-safe; several processes may use one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "packed"
        self.make: Callable[[str, LoraWeights], Pieces | None] | None = None
        """Makes the content of an adapter's packed file from the adapter's digest and weights.

        Returns None if the file isn't worth its space, or if there is no space (`has_room`). Raises ValueError or
        RuntimeError if the adapter can't be packed.
        """
        self.min_free_bytes = 0
        """Bytes of the disk that must stay free, in addition to a tenth of the disk."""

    def add(self, weights: LoraWeights) -> None:
        """Make and store the packed file of an adapter that was just stored. This is best effort."""
        if self.make is not None:
            with suppress(OSError, ValueError, RuntimeError):
                if (pieces := self.make(weights.digest, weights)) is not None:
                    self.keep(weights.digest, pieces)

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a tenth of the disk and `min_free_bytes` would stay free after storing `num_bytes`.

        Raise OSError if the disk fails.
        """
        self._folder.mkdir(exist_ok=True)
        disk = shutil.disk_usage(self._folder)
        return disk.free - num_bytes >= self.min_free_bytes + disk.total // _FREE_SHARE

    def keep(self, digest: str, pieces: Pieces) -> None:
        """Store an adapter's packed file, whole or not at all. Raise OSError if the disk fails.

        If the adapter was discarded, or there is no room, this is a no-op.
        """
        if not self.has_room(sum(piece.nbytes for piece in pieces)):
            return
        with new_file(self._folder / digest) as unfinished, unfinished.open("wb") as file:
            file.writelines(pieces)
        if not self._has_bytes(digest):  # it was discarded meanwhile
            self.remove(digest)

    def open(self, digest: str) -> FileIO:
        """Open an adapter's packed file, and record the time of this use.

        Raise FileNotFoundError if there is no such file, or another OSError if the disk fails. If the file were
        mapped instead, an I/O error would end the process (SIGBUS).
        """
        file = FileIO(self._folder / digest)
        try:
            os.utime(file.fileno())
        except BaseException:
            file.close()
            raise
        return file

    def contents(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each file's digest and bytes, which are mapped, for a check. This doesn't count as a use."""
        for path in sorted(self._folder.glob("*")):
            if not path.name.startswith(UNFINISHED):
                with suppress(OSError, RuntimeError, TensorFileError):
                    yield path.name, map_file(path)

    def remove(self, digest: str) -> None:
        """Remove an adapter's packed file, if there is one."""
        with suppress(OSError):
            (self._folder / digest).unlink(missing_ok=True)

    def facts(self, digest: str) -> tuple[float, int]:
        """Return the time of a packed file's last use and its size in bytes, or zeros if there is no such file."""
        try:
            found = (self._folder / digest).stat()
        except OSError:
            return 0.0, 0
        return found.st_mtime, found.st_size

    def sweep(self) -> None:
        """Remove what killed processes left: unfinished files, and files of discarded adapters."""
        remove_abandoned(self._folder)
        for path in self._folder.glob("*"):
            if not (path.name.startswith(UNFINISHED) or self._has_bytes(path.name)):
                self.remove(path.name)

    def _has_bytes(self, digest: str) -> bool:
        return (self._root / digest[:2] / digest).is_dir()
