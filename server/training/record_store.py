"""The base class of the stores of data sets and of files: a folder for each id, with a metadata record in JSON."""

import builtins
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, Protocol, TypeVar

from adapters.errors import NotFound, SmoloraError
from adapters.storage.folders import BucketFolders, Folders, Read

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

log = logging.getLogger("smolora.training")


class StoredRecord(Protocol):
    """The metadata fields that data sets and files have in common."""

    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...


R = TypeVar("R", bound=StoredRecord)


class RecordStore(Generic[R]):
    """Data sets or files under one root, or in a bucket. Thread-safe; several processes may use one root.

    With a bucket, all methods raise BytesUnavailable if the bucket can't be reached, and the root has only files
    that are being written or read.
    """

    def __init__(
        self,
        root: Path,
        bucket: "Bucket | None",
        *,
        ids: re.Pattern[str],
        file_name: str,
        decode: Callable[[Mapping[str, object]], R],
        missing: Callable[[], NotFound],
        corrupt: type[SmoloraError],
    ) -> None:
        """Open the store; `root` needn't exist yet.

        `ids` matches valid ids. `decode` turns the JSON of the file `file_name` into a record, or raises
        ValueError. `missing` returns the error for an unknown id. `corrupt` is the type of error for a damaged
        record.
        """
        self._folders = Folders(root, file_name) if bucket is None else BucketFolders(root, file_name, bucket)
        self._ids = ids
        self._decode = decode
        self._missing = missing
        self._corrupt = corrupt
        self._logged: set[str] = set()  # ids of damaged records that have been logged

    def get(self, record_id: str) -> R:
        """Return the record. Raise NotFound if it doesn't exist, CorruptDataset or CorruptFile if it's damaged."""
        record = self._find(record_id)
        if record is None:
            raise self._missing()
        return record

    def has(self, record_id: str) -> bool:
        """Return whether the record exists, even if it is damaged. Raise NotFound if the id is malformed."""
        return self._folders.has(self._checked(record_id))

    def present(self, record_ids: set[str]) -> set[str]:
        """Return the ids, among `record_ids`, of records that exist, even if they are damaged."""
        return self._folders.present(record_ids)

    def ids(self) -> set[str]:
        """Return the ids of all records, including damaged ones."""
        return set(filter(self._ids.fullmatch, self._folders.all()))

    def list(self) -> builtins.list[R]:
        """Return all intact records, newest first. Each damaged record is logged once."""
        found = []
        for record_id, read in self._folders.all().items():
            if not self._ids.fullmatch(record_id):
                continue
            try:
                record = self._decoded(record_id, read)
            except self._corrupt as error:
                if record_id not in self._logged:
                    self._logged.add(record_id)
                    log.warning("%s: lists leave it out", error)
                continue
            if record is not None:
                found.append(record)
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    def delete(self, record_id: str) -> None:
        """Delete the record and its files. Open readers are unaffected. Raise NotFound if it doesn't exist."""
        try:
            self._folders.delete(self._checked(record_id))
        except FileNotFoundError:
            raise self._missing() from None

    def clean(self) -> None:
        """Remove the unfinished files of killed processes, once they are old enough."""
        self._folders.clean()

    def _new(self, record_id: str) -> AbstractContextManager[Path]:
        """Yield a directory to fill. When the block ends, store the directory unless the record exists by then."""
        return self._folders.new(self._checked(record_id))

    def _renewed(self, record_id: str) -> AbstractContextManager[Path]:
        """Yield a directory to fill. When the block ends, the directory replaces the damaged record's.

        Raise OSError if that fails.
        """
        return self._folders.renewed(self._checked(record_id))

    def _open(self, record_id: str, name: str) -> BinaryIO:
        """Open a file of the record, which stays readable if deleted. Raise FileNotFoundError if it's missing."""
        return self._folders.open(self._checked(record_id), name)

    def _digest(self, record_id: str, name: str) -> str:
        """Return the SHA-256 of one of the record's files. Raise OSError if the file is missing or unreadable."""
        return self._folders.digest(self._checked(record_id), name)

    def _find(self, record_id: str) -> R | None:
        """Return the record, or None if it doesn't exist. Raise NotFound if the id is malformed."""
        return self._decoded(record_id, partial(self._folders.read, self._checked(record_id)))

    def _checked(self, record_id: str) -> str:
        if not self._ids.fullmatch(record_id):
            raise self._missing()
        return record_id

    def _decoded(self, record_id: str, read: Read) -> R | None:
        """Return the record that `read` reads, or None if it was deleted meanwhile."""
        try:
            return self._decode(read())
        except FileNotFoundError:
            if not self._folders.has(record_id):
                return None
            raise self._corrupt(f"the facts of {record_id} are unreadable") from None
        except (OSError, ValueError):
            raise self._corrupt(f"the facts of {record_id} are unreadable") from None
