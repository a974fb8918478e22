"""Directories under one root, each with an id and a record: what data sets and files have in common.

The root needn't be there before something is put into it.

<root>/<id>/<record's file>      JSON; a directory with it is whole
"""

import builtins
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, Protocol, TypeVar

from adapters.durable import UNFINISHED, new_directory, new_file, remove_abandoned, remove_directory
from adapters.errors import NotFound, SmoloraError

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket

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
        missing: str,
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
            raise NotFound(self._missing)
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
            raise NotFound(self._missing)
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
            raise NotFound(self._missing) from None

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
    missing: str,
    corrupt: type[SmoloraError],
    bucket: "Bucket | None",
) -> RecordStore[R]:
    """A `RecordStore`; in the bucket, where there is one, and `root` then has room for what is on its way."""
    if bucket is None:
        return RecordStore(root, ids, file_name, decode, missing, corrupt)
    from server.training.data.shared_record_store import SharedRecordStore

    return SharedRecordStore(root, ids, file_name, decode, missing, corrupt, bucket)
