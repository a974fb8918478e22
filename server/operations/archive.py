"""The file of a backup: a tar, compressed or not, of which no byte counts that its manifest doesn't name.

    backup.json        first: which smolora wrote it, and the database's schema
    …                  what was in HOME, by its path there
    manifest.json      last: the SHA-256 and size of every member that counts; so a file that was cut off is told

A member that the manifest leaves out was overtaken while the backup was being made. Ordinary tar reads it, too.
What is read may be anybody's: whatever isn't an ordinary file at one of the places that a HOME has is refused.
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import IO, BinaryIO

from server.errors import StartupError

HEADER, MANIFEST = "backup.json", "manifest.json"
FORMAT = 1

_ROOTS = frozenset({"adapters", "datasets", "files", "jobs", "projects"})
_FILES = frozenset({"smolora.db", "keyed"})
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_MAX_DEPTH = 8
_MAX_HEADER, _MAX_MANIFEST = 1 << 16, 1 << 30
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Header:
    """What a backup says of itself, before anything else is read of it."""

    smolora: str  # the version that wrote it
    schema: str  # of the database: its newest migration
    created_at: str  # ISO 8601, in UTC
    format: int = FORMAT


@dataclass(frozen=True)
class Member:
    """What a member must be."""

    sha256: str
    size: int


class Writer:
    """Writes one backup into an open file. `members` are those that are in it so far."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.members: dict[str, Member] = {}
        self._tar = tar

    def begin(self, header: Header) -> None:
        """Before everything else."""
        self._add(HEADER, io.BytesIO(text := _json(asdict(header))), len(text), 0)

    def add(self, name: str, content: BinaryIO, size: int, modified: float = 0) -> None:
        """So many bytes of `content`, under a name that isn't in it yet. Raises OSError."""
        assert name not in self.members, name
        hashed = self._add(name, content, size, modified)
        self.members[name] = Member(hashed.digest.hexdigest(), size)

    def end(self, names: Collection[str]) -> None:
        """After everything else: these are the members that count."""
        kept = {name: asdict(self.members[name]) for name in sorted(names)}
        self._add(MANIFEST, io.BytesIO(text := _json({"members": kept})), len(text), 0)

    def _add(self, name: str, content: IO[bytes], size: int, modified: float) -> "_Hashed":
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode, entry.mtime = size, 0o600, int(modified)
        hashed = _Hashed(content)
        self._tar.addfile(entry, hashed)
        return hashed


class Reader:
    """One backup, read from its beginning to its end: first the header, then `members`, then the manifest."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        entry = tar.next()
        if entry is None or entry.name != HEADER:
            raise StartupError("it is no backup of smolora's")
        self.header = _header(self._content(entry, _MAX_HEADER))
        self.manifest: Mapping[str, Member] = {}

    def members(self) -> Iterator[tuple[str, IO[bytes]]]:
        """Each name with its content, which is to be read before the next one. Raises StartupError."""
        seen = {HEADER}
        while (entry := self._tar.next()) is not None:
            if entry.name in seen:
                raise StartupError(f"{entry.name!r} is in it twice")
            seen.add(entry.name)
            if entry.name == MANIFEST:
                self.manifest = _manifest(self._content(entry, _MAX_MANIFEST))
                if self._tar.next() is not None:
                    raise StartupError("there is more after its manifest")
                return
            if entry.type != tarfile.REGTYPE or entry.issparse():
                raise StartupError(f"{entry.name!r} is no ordinary file")
            if not is_place(entry.name):
                raise StartupError(f"{entry.name!r} is no place in a HOME")
            yield entry.name, self._open(entry)
        raise StartupError("it ends before its manifest: it was cut off")

    def _content(self, entry: tarfile.TarInfo, most: int) -> bytes:
        if entry.type != tarfile.REGTYPE or entry.size > most:
            raise StartupError(f"its {entry.name} is none")
        return self._open(entry).read()

    def _open(self, entry: tarfile.TarInfo) -> IO[bytes]:
        found = self._tar.extractfile(entry)
        assert found is not None, "it is an ordinary file"
        return found


@contextmanager
def writing(file: IO[bytes], compressed: bool) -> Iterator[Writer]:
    """A backup that is written into `file`, from where that stands."""
    # The fastest level: weights hardly shrink at any, and the database does at this one.
    packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) if compressed else nullcontext(file)
    with packed as inner, tarfile.open(fileobj=inner, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK) as tar:
        yield Writer(tar)


@contextmanager
def reading(file: io.BufferedReader) -> Iterator[Reader]:
    """The backup in `file`, compressed or not. Raises StartupError, within the block too, where it is damaged."""
    is_compressed = file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
    try:
        inner: gzip.GzipFile | io.BufferedReader = (
            gzip.GzipFile(fileobj=file, mode="rb") if is_compressed else file
        )
        with tarfile.open(fileobj=inner, mode="r|", bufsize=_CHUNK) as tar:
            yield Reader(tar)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StartupError(f"it is damaged, or was cut off ({error})") from None


def copy_hashed(source: IO[bytes], target: BinaryIO) -> Member:
    """All of it; what it was."""
    hashed = _Hashed(source)
    size = 0
    while chunk := hashed.read(_CHUNK):
        target.write(chunk)
        size += len(chunk)
    return Member(hashed.digest.hexdigest(), size)


def is_place(name: str) -> bool:
    """Whether a HOME may have a file of this name, relative to it, that a backup would keep."""
    if name in _FILES:
        return True
    root, *rest = name.split("/")
    return root in _ROOTS and 0 < len(rest) < _MAX_DEPTH and all(map(_PART.fullmatch, rest))


class _Hashed:
    """A stream whose bytes are hashed as they are read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(size)
        self.digest.update(chunk)
        return chunk


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, indent=1).encode()


def _header(text: bytes) -> Header:
    try:
        found = json.loads(text)
        header = Header(**{key: found[key] for key in ("smolora", "schema", "created_at", "format")})
        if not isinstance(header.format, int) or not all(
            isinstance(value, str) for value in (header.smolora, header.schema, header.created_at)
        ):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StartupError(f"its {HEADER} can't be read") from None
    return header


def _manifest(text: bytes) -> dict[str, Member]:
    try:
        found = json.loads(text)["members"]
        return {str(name): Member(str(of["sha256"]), int(of["size"])) for name, of in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StartupError(f"its {MANIFEST} can't be read") from None
