"""Write zip archives for downloads, and read an adapter's two files from an uploaded archive.

Downloads follow PKWARE's APPNOTE.TXT, 4.3 and 4.5.3. Files are stored uncompressed, since weights hardly
compress, and are streamed, which takes little memory. Python's zipfile isn't used: it can't tell an archive's
length in advance, and when it writes to a stream, it puts each file's size and checksum after the file, which
many readers refuse for uncompressed files. Here, each file is read twice: once to compute its checksum, and once
to send it.

Uploads are untrusted, and never unpacked. Two entries are read by name, up to size limits that don't depend on
what the archive's headers claim.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters.errors import InvalidInput
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft.tensor_file import SAVE_AGAIN
from server.api.streams import Download

CHUNK = 1 << 18
LARGEST = 0xFFFFFFFF
"""Sizes and offsets of at least this value are written to the fields of the zip64 format."""

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_UTF_8 = 0x800  # flag: names are encoded in UTF-8
_DATE = 0x21  # always 1 January 1980, so that equal files make equal archives
_MADE_BY = 3 << 8 | 45  # Unix: attributes are file modes
_MODE = 0o644 << 16


@dataclass(frozen=True)
class _Entry:
    name: bytes
    size: int
    place: int  # offset in the archive
    crc: int = 0

    def local(self, largest: int) -> bytes:
        """Return the local header, which precedes the file. The header's length doesn't depend on the checksum.

        If the file has at least `largest` bytes, the header has zip64 fields.
        """
        extra = _extra(self.size, self.size) if self.size >= largest else b""
        size = LARGEST if extra else self.size
        version = 45 if extra else 20
        fields = (version, _UTF_8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return _LOCAL.pack(b"PK\3\4", *fields) + self.name + extra

    def central(self, largest: int) -> bytes:
        """Return the entry in the archive's central directory.

        If the file's size or offset is at least `largest`, the entry has zip64 fields.
        """
        is_large, is_far = self.size >= largest, self.place >= largest
        extra = _extra(*(self.size, self.size) * is_large, *(self.place,) * is_far)
        size, place = LARGEST if is_large else self.size, LARGEST if is_far else self.place
        version = 45 if extra else 20
        fields = (_MADE_BY, version, _UTF_8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return _CENTRAL.pack(b"PK\1\2", *fields, 0, 0, 0, _MODE, place) + self.name + extra


def zip_download(archive: "StoredZip", name: str) -> Download:
    """Return a response that sends the archive, to be saved under `name`, and closes it."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return Download(archive.chunks(), archive.length, "application/zip", headers, archive.close)


class StoredZip:
    """A zip archive made of open files. `close` closes the files.

    Sizes and offsets of at least `largest` are written in the zip64 format. Tests lower `largest`, so that small
    archives use zip64.
    """

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
        """Yield the archive in pieces. Iterate only once. Raise OSError if a file can't be read.

        Empty pieces are yielded while a checksum is computed, so that the caller can stop during that time.
        """
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
        """Return the central directory, which begins at offset `at`, and the end record."""
        listed = b"".join(entry.central(self._largest) for entry in entries)
        number, size = len(entries), len(listed)
        if at < self._largest:
            return listed + _END.pack(b"PK\5\6", 0, 0, number, number, size, at, 0)
        end = _END_64.pack(b"PK\6\6", _END_64.size - 12, _MADE_BY, 45, 0, 0, number, number, size, at)
        end += _LOCATOR_64.pack(b"PK\6\7", 0, at + size, 1)
        return listed + end + _END.pack(b"PK\5\6", 0, 0, number, number, size, LARGEST, 0)


def _extra(*values: int) -> bytes:
    """Return the zip64 extra field with the given values, or b"" if there are no values."""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    file.seek(0)
    while size:
        piece = file.read(min(CHUNK, size))
        if not piece:
            raise OSError("a file has become shorter")
        size -= len(piece)
        yield piece


FIELD = "archive"
MAX_WEIGHTS_BYTES = 512 << 20
"""The maximum size of decompressed tensors. Weights hardly compress, so uploads reach their own limit first."""
MAX_ENTRIES = 1000
_MAX_DIRECTORY_BYTES = 1 << 20  # of the central directory, which Python reads into memory
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 1 << 20


def read_archive(file: BinaryIO, weights: Path, max_config: int, max_weights: int = MAX_WEIGHTS_BYTES) -> bytes:
    """Copy an archive's tensor file to `weights`, and return the configuration's bytes.

    Raise InvalidInput if `file` isn't a valid archive, or if one of the two files is missing or too large.
    """
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            config_entry, weights_entry = _entries(archive)
            with archive.open(weights_entry) as source, weights.open("wb") as target:
                size = 0
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    if size > max_weights:
                        raise _refused(f"{WEIGHTS_NAME} inflates to more than {max_weights} bytes")
                    target.write(chunk)
            with archive.open(config_entry) as source:
                config = source.read(max_config + 1)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        # RuntimeError, NotImplementedError: the archive is encrypted, or compressed in an unknown way
        raise _refused("is not a plain, complete zip file: put the two files that PEFT saved into one") from None
    if len(config) > max_config:
        raise _refused(f"{CONFIG_NAME} is larger than {max_config} bytes")
    return config


def _check_directory(file: BinaryIO) -> None:
    """Raise InvalidInput if the archive's central directory is too large, before Python reads it into memory."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END.size - 0xFFFF))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise _refused("is not a plain, complete zip file: put the two files that PEFT saved into one")
    if tail[max(0, at - 20) :].startswith(b"PK\x06\x07"):
        raise _refused("is in the zip64 format, which an adapter's two files don't need")
    directory_bytes = _END.unpack_from(tail, at)[5]
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise _refused(f"has more than {MAX_ENTRIES} files")


def _entries(archive: zipfile.ZipFile) -> tuple[zipfile.ZipInfo, zipfile.ZipInfo]:
    """Return the entries of the configuration and the tensors.

    Raise InvalidInput unless both are in the archive's root, or both in one folder of it. Also raise it if one is
    ambiguous, encrypted or compressed by an unusual method, or if the archive has too many files.
    """
    # `is_dir` would fail on an empty name
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if len(infos) > MAX_ENTRIES:
        raise _refused(f"has more than {MAX_ENTRIES} files")
    found: dict[str, zipfile.ZipInfo] = {}
    folders: set[PurePosixPath] = set()
    for info in infos:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.name not in (CONFIG_NAME, WEIGHTS_NAME):
            continue
        if path.is_absolute() or ".." in path.parts or len(path.parts) > 2:
            raise _refused(f"{path.name} must be in its root, or in one folder of it")
        if path.name in found:
            raise _refused(f"has more than one {path.name}")
        if info.flag_bits & 0x1:
            raise _refused(f"{path.name} is encrypted")
        if info.compress_type not in _METHODS:  # other methods may need gigabytes to inflate a byte
            raise _refused(f"{path.name} is compressed by another method than deflate")
        found[path.name] = info
        folders.add(path.parent)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in found:
            has_bin = name == WEIGHTS_NAME and any(info.filename.endswith("adapter_model.bin") for info in infos)
            advice = f": adapter_model.bin isn't read; {SAVE_AGAIN}" if has_bin else ""
            raise _refused(f"has no {name}{advice}")
    if len(folders) > 1:
        raise _refused("has its two files in different folders")
    return found[CONFIG_NAME], found[WEIGHTS_NAME]


def _refused(reason: str) -> InvalidInput:
    return InvalidInput.of(FIELD, reason)
