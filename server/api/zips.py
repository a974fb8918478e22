"""Zip archives that are sent: files as they are (weights hardly deflate), of a known length, in little memory.

Follows PKWARE's APPNOTE.TXT, 4.3 and 4.5.3. Python's zipfile can't say how long an archive will be, and where it
can't go back in it, puts each file's size and checksum behind the file, which many readers refuse of stored files.
So each file is read twice: for its checksum, and to be sent.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from server.api.streams import Download

CHUNK = 1 << 18
LARGEST = 0xFFFFFFFF
"""From here on, sizes and places stand in the zip64 format's fields."""

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_UTF_8 = 0x800  # of names
_DATE = 0x21  # 1 January 1980: equal files make equal archives
_MADE_BY = 3 << 8 | 45  # Unix, whose modes are in the attributes
_MODE = 0o644 << 16


@dataclass(frozen=True)
class _Entry:
    name: bytes
    size: int
    place: int  # where it begins in the archive
    crc: int = 0

    def local(self, largest: int) -> bytes:
        """What stands before the file. As long, whatever the checksum is."""
        extra = _extra(self.size, self.size) if self.size >= largest else b""
        size = LARGEST if extra else self.size
        version = 45 if extra else 20
        fields = (version, _UTF_8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return _LOCAL.pack(b"PK\3\4", *fields) + self.name + extra

    def central(self, largest: int) -> bytes:
        """Its entry in the archive's list."""
        is_large, is_far = self.size >= largest, self.place >= largest
        extra = _extra(*(self.size, self.size) * is_large, *(self.place,) * is_far)
        size, place = LARGEST if is_large else self.size, LARGEST if is_far else self.place
        version = 45 if extra else 20
        fields = (_MADE_BY, version, _UTF_8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return _CENTRAL.pack(b"PK\1\2", *fields, 0, 0, 0, _MODE, place) + self.name + extra


def zip_download(archive: "StoredZip", name: str) -> Download:
    """The archive as a response, to be saved under the name; it is closed at the end."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return Download(archive.chunks(), archive.length, "application/zip", headers, archive.close)


class StoredZip:
    """An archive of open files, which it reads from the start and closes. `largest` is for tests."""

    def __init__(self, files: Mapping[str, BinaryIO], largest: int = LARGEST) -> None:
        self._largest = largest
        self._files = dict(files)
        self._entries: list[_Entry] = []
        at = 0
        for name, file in files.items():
            entry = _Entry(name.encode(), file.seek(0, 2), at)
            self._entries.append(entry)
            at += len(entry.local(largest)) + entry.size
        self.length = at + len(self._tail(self._entries, at))

    def chunks(self) -> Iterator[bytes]:
        """The archive, once; an empty piece now and then, for whoever may want to stop. Raises OSError."""
        done: list[_Entry] = []
        at = 0
        for entry, file in zip(self._entries, self._files.values(), strict=True):
            crc = 0
            for piece in _read(file, entry.size):
                crc = zlib.crc32(piece, crc)
                yield b""
            done.append(_Entry(entry.name, entry.size, at, crc))
            yield (head := done[-1].local(self._largest))
            yield from _read(file, entry.size)
            at += len(head) + entry.size
        yield self._tail(done, at)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _tail(self, entries: list[_Entry], at: int) -> bytes:
        """The list of files, which begins at `at`, and the archive's end."""
        listed = b"".join(entry.central(self._largest) for entry in entries)
        number, size = len(entries), len(listed)
        if at < self._largest:
            return listed + _END.pack(b"PK\5\6", 0, 0, number, number, size, at, 0)
        end = _END_64.pack(b"PK\6\6", _END_64.size - 12, _MADE_BY, 45, 0, 0, number, number, size, at)
        end += _LOCATOR_64.pack(b"PK\6\7", 0, at + size, 1)
        return listed + end + _END.pack(b"PK\5\6", 0, 0, number, number, size, LARGEST, 0)


def _extra(*values: int) -> bytes:
    """The zip64 format's field of what is too large for its place."""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    file.seek(0)
    while size:
        piece = file.read(min(CHUNK, size))
        if not piece:
            raise OSError("a file has become shorter")
        size -= len(piece)
        yield piece
