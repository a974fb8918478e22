"""The format of a backup's file: a tar, compressed or not, whose manifest names every valid member.

    backup.json        first: which smolora wrote it, and the database's schema
    ...                the files of HOME, by their paths there
    manifest.json      last: the SHA-256 and size of every valid member

A truncated file has no manifest. A member that the manifest doesn't name became obsolete while the backup was
being made. Any tar program can read the file. A backup may come from anybody, so a reader refuses every member
that isn't a regular file at a path that can occur in a HOME.
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
    """What wrote a backup, and when: the first member of the backup."""

    smolora: str  # the release that wrote it
    schema: str  # the database's newest migration
    created_at: str  # ISO 8601, in UTC
    format: int = FORMAT


@dataclass(frozen=True)
class Member:
    """What a backup's manifest says of one member: the digest and size of its content."""

    sha256: str
    size: int


class Writer:
    """Writes one backup into an open file. `members` are the members written so far."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.members: dict[str, Member] = {}
        self._tar = tar

    def begin(self, header: Header) -> None:
        """Write the header. Call this first."""
        self._add(HEADER, io.BytesIO(text := _json(asdict(header))), len(text), 0)

    def add(self, name: str, content: BinaryIO, size: int, modified: float = 0) -> None:
        """Write `size` bytes of `content` as a new member. Raise OSError if the file can't be written."""
        assert name not in self.members, name
        hashed = self._add(name, content, size, modified)
        self.members[name] = Member(hashed.digest.hexdigest(), size)

    def end(self, names: Collection[str]) -> None:
        """Write the manifest, in which only the members `names` are valid. Call this last."""
        kept = {name: asdict(self.members[name]) for name in sorted(names)}
        self._add(MANIFEST, io.BytesIO(text := _json({"members": kept})), len(text), 0)

    def _add(self, name: str, content: IO[bytes], size: int, modified: float) -> "_Hashed":
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode, entry.mtime = size, 0o600, int(modified)
        hashed = _Hashed(content)
        self._tar.addfile(entry, hashed)
        return hashed


class Reader:
    """Reads one backup sequentially: the header, then `members`, then `manifest`."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        entry = tar.next()
        if entry is None or entry.name != HEADER:
            raise StartupError("it isn't a backup of smolora")
        self.header = _header(self._content(entry, _MAX_HEADER))
        self.manifest: Mapping[str, Member] = {}

    def members(self) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield each member's name and content. The content must be read before the next member.

        Raise StartupError if a member isn't allowed, or if the backup has no manifest.
        """
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
                raise StartupError(f"{entry.name!r} isn't a regular file")
            if not is_place(entry.name):
                raise StartupError(f"{entry.name!r} isn't a path that a HOME has")
            yield entry.name, self._open(entry)
        raise StartupError("it ends before its manifest: it is truncated")

    def _content(self, entry: tarfile.TarInfo, most: int) -> bytes:
        if entry.type != tarfile.REGTYPE or entry.size > most:
            raise StartupError(f"its {entry.name} isn't a regular file, or is too large")
        return self._open(entry).read()

    def _open(self, entry: tarfile.TarInfo) -> IO[bytes]:
        found = self._tar.extractfile(entry)
        assert found is not None, "it is a regular file"
        return found


@contextmanager
def writing(file: IO[bytes], compressed: bool) -> Iterator[Writer]:
    """Yield a writer of a backup into `file`, from its current position."""
    # The fastest level of compression: weights hardly shrink at any level, and the database does at this one.
    packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) if compressed else nullcontext(file)
    with packed as inner, tarfile.open(fileobj=inner, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK) as tar:
        yield Writer(tar)


@contextmanager
def reading(file: io.BufferedReader) -> Iterator[Reader]:
    """Yield a reader of the backup in `file`, compressed or not.

    Raise StartupError if the backup is damaged. Some damage is found only when the block reads the members.
    """
    is_compressed = file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
    try:
        inner: gzip.GzipFile | io.BufferedReader = (
            gzip.GzipFile(fileobj=file, mode="rb") if is_compressed else file
        )
        with tarfile.open(fileobj=inner, mode="r|", bufsize=_CHUNK) as tar:
            yield Reader(tar)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StartupError(f"it is damaged or truncated ({error})") from None


def copy_hashed(source: IO[bytes], target: BinaryIO) -> Member:
    """Copy all bytes of `source` to `target`, and return their digest and size."""
    hashed = _Hashed(source)
    size = 0
    while chunk := hashed.read(_CHUNK):
        target.write(chunk)
        size += len(chunk)
    return Member(hashed.digest.hexdigest(), size)


def is_place(name: str) -> bool:
    """Return whether `name` is a path, relative to HOME, that a file in a backup may have."""
    if name in _FILES:
        return True
    root, *rest = name.split("/")
    return root in _ROOTS and 0 < len(rest) < _MAX_DEPTH and all(map(_PART.fullmatch, rest))


class _Hashed:
    """Hashes a stream's bytes as they are read."""

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
        raise StartupError(f"its {HEADER} is unreadable") from None
    return header


def _manifest(text: bytes) -> dict[str, Member]:
    try:
        found = json.loads(text)["members"]
        return {str(name): Member(str(of["sha256"]), int(of["size"])) for name, of in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StartupError(f"its {MANIFEST} is unreadable") from None
