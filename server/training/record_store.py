"""Directories under one root, each with an id and a record: what data sets and files have in common.

The root needn't be there before something is put into it.

<root>/<id>/<record's file>      JSON; a directory with it is whole

Records and their files in a bucket that machines share: each a folder of `adapters.storage.copies`.

Of an id that two machines stored at once there are two copies: the older one counts for both. A file that is read
comes to an unnamed one on this machine's disk first, so that it outlives a delete.
"""

import builtins
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, Protocol, TypeVar, cast

from adapters.errors import NotFound, SmoloraError
from adapters.storage.bucket import Bucket, Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import (
    ABANDONED_AFTER,
    UNFINISHED,
    new_directory,
    new_file,
    remove_abandoned,
    remove_directory,
)

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

log = logging.getLogger("smolora.training")

_PIECE = 1 << 20


class StoredRecord(Protocol):
    """What a record says at the least."""

    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...


R = TypeVar("R", bound=StoredRecord)


class RecordStore(Generic[R]):
    """The directories under one root. Thread-safe; several processes may use one root."""

    def __init__(
        self,
        root: Path,
        ids: re.Pattern[str],
        file_name: str,
        decode: Callable[[Mapping[str, object]], R],
        missing: Callable[[], NotFound],
        corrupt: type[SmoloraError],
    ) -> None:
        """`decode` raises ValueError on what is no record; `missing` says what no id names."""
        self._root = root
        self._ids = ids
        self._file_name = file_name
        self._decode = decode
        self._missing = missing
        self._corrupt = corrupt
        self._told: set[str] = set()  # damaged ones, of which the log has a line already

    def place(self, record_id: str) -> Path:
        """Its directory, whether or not it is there. Raises NotFound for what can't be an id."""
        if not self._ids.fullmatch(record_id):
            raise self._missing()
        return self._root / record_id

    def new(self, record_id: str) -> AbstractContextManager[Path]:
        """Fill the directory that this yields; on leaving it is stored, unless another one of that id came first.

        Raises OSError.
        """
        return new_directory(self.place(record_id))

    @contextmanager
    def renewed(self, record_id: str) -> Iterator[Path]:
        """As `new`, for a damaged record: each file takes the place of the one that is there. Raises OSError."""
        place = self.place(record_id)
        directory = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{record_id}-", dir=self._root))
        try:
            yield directory
            place.mkdir(exist_ok=True)
            for path in sorted(directory.iterdir(), key=lambda path: path.name == self._file_name):
                with new_file(place / path.name) as file:
                    path.replace(file)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def open(self, record_id: str, name: str) -> BinaryIO:
        """One of its files, to read and close; it outlives a delete. Raises FileNotFoundError."""
        return (self.place(record_id) / name).open("rb")

    def digest(self, record_id: str, name: str) -> str:
        """The SHA-256 of one of its files. Raises FileNotFoundError, OSError."""
        digest = hashlib.sha256()
        with self.open(record_id, name) as file:
            for piece in iter(partial(file.read, _PIECE), b""):
                digest.update(piece)
        return digest.hexdigest()

    def find(self, record_id: str) -> R | None:
        """The record, or None. Raises NotFound for what can't be an id, and what `corrupt` is."""
        return self._read(self.place(record_id))

    def get(self, record_id: str) -> R:
        """Raises NotFound."""
        record = self.find(record_id)
        if record is None:
            raise self._missing()
        return record

    def has(self, record_id: str) -> bool:
        """Whether it is there, perhaps damaged."""
        place = self.place(record_id)
        try:
            return place.is_dir()
        except OSError:  # of a damaged disk
            return True

    def present(self, record_ids: set[str]) -> set[str]:
        """Those of them that are there, perhaps damaged."""
        return set(filter(self.has, record_ids))

    def ids(self) -> set[str]:
        """Those of all records, of damaged ones too."""
        if not self._root.is_dir():
            return set()
        names = (path.name for path in self._root.iterdir() if self._ids.fullmatch(path.name))
        return {name for name in names if self.has(name)}

    def list(self) -> list[R]:
        """All that can be read, newest first; the log names the others."""
        return self._readable(self.ids(), self.find)

    def delete(self, record_id: str) -> None:
        """Raises NotFound. Who is reading it now reads on."""
        try:
            remove_directory(self.place(record_id))
        except FileNotFoundError:
            raise self._missing() from None

    def clean(self) -> None:
        """Drop what killed processes left, once it is old enough."""
        remove_abandoned(self._root)

    def _readable(self, record_ids: Iterable[str], find: Callable[[str], R | None]) -> builtins.list[R]:
        found = []
        for record_id in record_ids:
            try:
                record = find(record_id)
            except self._corrupt as error:
                if record_id not in self._told:
                    self._told.add(record_id)
                    log.warning("%s: no list has it", error)
                continue
            if record is not None:  # or it was deleted just now
                found.append(record)
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    def _read(self, place: Path) -> R | None:
        try:
            return self._decode(json.loads((place / self._file_name).read_bytes()))
        except FileNotFoundError:
            if place.is_dir():
                raise self._unreadable(place.name) from None
            return None
        except (OSError, ValueError):
            raise self._unreadable(place.name) from None

    def _unreadable(self, record_id: str) -> SmoloraError:
        return self._corrupt(f"the facts of {record_id} are unreadable")


def record_store(
    root: Path,
    ids: re.Pattern[str],
    file_name: str,
    decode: Callable[[Mapping[str, object]], R],
    missing: Callable[[], NotFound],
    corrupt: type[SmoloraError],
    bucket: "Bucket | None",
) -> RecordStore[R]:
    """A `RecordStore`; in the bucket, where there is one, and `root` then has room for what is on its way."""
    if bucket is None:
        return RecordStore(root, ids, file_name, decode, missing, corrupt)

    return SharedRecordStore(root, ids, file_name, decode, missing, corrupt, bucket)


_MAX_REMEMBERED = 10_000


class SharedRecordStore(RecordStore[R]):
    """As `RecordStore`; nothing stays under `root`. Whatever asks the bucket raises BytesUnavailable."""

    def __init__(
        self,
        root: Path,
        ids: re.Pattern[str],
        file_name: str,
        decode: Callable[[Mapping[str, object]], R],
        missing: Callable[[], NotFound],
        corrupt: type[SmoloraError],
        bucket: Bucket,
    ) -> None:
        super().__init__(root, ids, file_name, decode, missing, corrupt)
        self._copies = Copies(bucket, file_name)
        self._bucket = bucket
        self._remembered: dict[tuple[str, str], R] = {}  # by id and copy: no copy ever changes

    @contextmanager
    def new(self, record_id: str) -> Iterator[Path]:
        with self._filled(record_id) as directory:
            yield directory
            if self._copy(record_id) is None:
                self._copies.push(record_id, directory)

    @contextmanager
    def renewed(self, record_id: str) -> Iterator[Path]:
        damaged = self._copies.whole(record_id)
        with self._filled(record_id) as directory:
            yield directory
            self._copies.push(record_id, directory)
        self._copies.remove(damaged)

    def open(self, record_id: str, name: str) -> BinaryIO:
        copy = self._copy(record_id)
        if copy is None or name not in copy.files:
            raise FileNotFoundError(record_id)
        self._root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            file = opened.enter_context(tempfile.TemporaryFile(dir=self._root))
            try:
                self._bucket.copy_to(copy.files[name], cast("BinaryIO", file))
            except Missing:  # deleted just now
                raise FileNotFoundError(record_id) from None
            file.seek(0)
            opened.pop_all()
            return cast("BinaryIO", file)

    def digest(self, record_id: str, name: str) -> str:
        copy = self._copy(record_id)
        if copy is None or name not in copy.files:
            raise FileNotFoundError(record_id)
        hashed = _Hashed()
        try:
            self._bucket.copy_to(copy.files[name], cast("BinaryIO", hashed))
        except Missing:  # deleted just now
            raise FileNotFoundError(record_id) from None
        return hashed.digest.hexdigest()

    def find(self, record_id: str) -> R | None:
        copy = self._copy(record_id)
        return None if copy is None else self._record(copy)

    def has(self, record_id: str) -> bool:
        return self._copy(record_id) is not None

    def present(self, record_ids: set[str]) -> set[str]:
        """As `RecordStore.present`; several in one listing."""
        return record_ids & self.ids() if len(record_ids) > 1 else super().present(record_ids)

    def ids(self) -> set[str]:
        return set(self._whole())

    def list(self) -> list[R]:
        copies = self._whole()
        return self._readable(copies, lambda record_id: self._record(copies[record_id]))

    def delete(self, record_id: str) -> None:
        self.place(record_id)
        copies = self._copies.of(record_id)
        if not any(copy.is_whole for copy in copies):
            raise self._missing()
        self._copies.remove(copies)

    def clean(self) -> None:
        """As `RecordStore.clean`, and halves of uploads in the bucket."""
        super().clean()
        before = self._bucket.now() - timedelta(seconds=ABANDONED_AFTER)
        self._copies.remove(c for c in self._copies.all() if not c.is_whole and c.modified < before)

    @contextmanager
    def _filled(self, record_id: str) -> Iterator[Path]:
        """A directory on this machine's disk, for as long as the block."""
        self._root.mkdir(parents=True, exist_ok=True)
        self.place(record_id)  # or it can't be an id
        directory = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{record_id}-", dir=self._root))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _whole(self) -> dict[str, Copy]:
        """The copy of each record that counts."""
        found: dict[str, Copy] = {}
        for copy in self._copies.all():
            if copy.is_whole and self._ids.fullmatch(copy.folder):
                found.setdefault(copy.folder, copy)
        return found

    def _copy(self, record_id: str) -> Copy | None:
        self.place(record_id)
        return next(iter(self._copies.whole(record_id)), None)

    def _record(self, copy: Copy) -> R | None:
        key = (copy.folder, copy.id)
        if (record := self._remembered.get(key)) is None:
            try:
                record = self._decode(json.loads(self._copies.read(copy, self._file_name)))
            except Missing:
                return None
            except ValueError:
                raise self._unreadable(copy.folder) from None
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = record
        return record


class _Hashed:
    """Hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, piece: bytes) -> None:
        self.digest.update(piece)
