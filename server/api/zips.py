"""Zip archives that are sent: a folder's, made while it is read, and one more file in one that is there."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CHUNK = 1 << 20


class _Pipe(io.RawIOBase):
    """A file that is written to, and emptied. Without `seek`, so that zipfile doesn't go back in it."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer") -> int:
        view = memoryview(data)
        self._written += view
        return view.nbytes

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def with_file(archive: bytes, name: str, content: bytes) -> bytes:
    """The archive with one more file."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as target:
        target.writestr(_entry(name), content)
    return buffer.getvalue()


def zipped(directory: Path) -> Iterator[bytes]:
    """The folder's files as they are (weights hardly deflate), in pieces: any size, in little memory and no disk.

    Raises OSError where one vanishes meanwhile.
    """
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(directory.iterdir()):
            if not path.is_file():
                continue
            entry = _entry(path.name)
            entry.file_size = path.stat().st_size  # more than 2 GiB need other headers
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield pipe.take()
    yield pipe.take()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # of a fixed date
    entry.external_attr = 0o644 << 16
    return entry
