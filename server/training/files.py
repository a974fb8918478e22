"""Files as OpenAI's clients know them: bytes under an id of their own, published by one rename.

    <root>/file-…/content      the bytes as they came
                  file.json    name, purpose, size, date

Unlike data sets, two uploads of the same bytes are two files, and what is read back is what was sent. Every row
is checked before an uploaded file is there, and again as it is read. Who uses a file is the caller's to know:
`delete` asks nobody. Several processes may use one root.

All data sets and files that a HOME, or its bucket, has: read whole, and compared with their digests.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, cast

from adapters.errors import InvalidInput, NotFound, SmoloraError
from adapters.storage.durable import write_json
from server.storage.places import Storage
from server.training.datasets import CorruptDataset, DatasetStore
from server.training.record_store import record_store
from server.training.row_files import FILE, Format, read_rows, short_name
from server.training.rows import CanonicalRows, IgnoredFields, Row
from server.training.spec import read_document

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

Purpose = Literal["fine-tune", "fine-tune-results"]
PREFIX = "file-"
CONTENT = "content"
FACTS = "file.json"
_ID = re.compile(r"file-[A-Za-z0-9-]{1,80}")
_CHUNK = 1 << 20


class CorruptFile(SmoloraError):
    """A stored file is missing in part, or can't be read any more."""


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file. `format` is how its rows are read, for results as well."""

    id: str
    filename: str
    purpose: Purpose
    format: Format
    bytes: int
    sha256: str
    created_at: datetime  # UTC
    key_id: str | None = None  # of the API key that uploaded it, or had it made

    def to_document(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self) | {"created_at": self.created_at.isoformat()}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """What `to_document` made. Raises ValueError on anything else."""
        return read_document(cls, document)


def _no_file() -> NotFound:
    return NotFound("no file has this id")


class FileStore:
    """The files under one root, or in a bucket. Thread-safe. `key_id` is kept with what is put into it."""

    def __init__(self, root: Path, key_id: str | None = None, bucket: "Bucket | None" = None) -> None:
        self._key_id = key_id
        decode, missing = StoredFile.from_document, _no_file
        self._records = record_store(root, _ID, FACTS, decode, missing, CorruptFile, bucket)

    def put(self, stream: BinaryIO, filename: str) -> StoredFile:
        """Keep rows to train on, as CSV where the name ends so, else as JSONL.

        Raises InvalidInput with the lines and fields at fault, OSError where the disk is full: nothing stays then.
        """
        name = short_name(filename) or "rows.jsonl"
        file_format: Format = "csv" if name.lower().endswith(".csv") else "jsonl"
        file_id = f"{PREFIX}{secrets.token_hex(12)}"
        with self._records.new(file_id) as directory:
            content = directory / CONTENT
            with content.open("wb") as copy:
                shutil.copyfileobj(stream, copy, _CHUNK)
            with content.open("rb") as copy:
                read = _Hashed(copy)
                if not sum(1 for _ in read_rows(cast("BinaryIO", read), file_format)):
                    raise InvalidInput.of(FILE, "has no rows")
            size = content.stat().st_size
            digest = read.digest.hexdigest()
            file = StoredFile(
                file_id, name, "fine-tune", file_format, size, digest, datetime.now(UTC), self._key_id
            )
            write_json(directory / FACTS, file.to_document())
        return file

    def put_results(self, job_id: str, content: bytes) -> StoredFile:
        """Keep a job's results, a CSV; those that an earlier attempt at the job left stay as they are."""
        file_id = results_id(job_id)
        digest = hashlib.sha256(content).hexdigest()
        name, size = f"{job_id}.csv", len(content)
        made = (datetime.now(UTC), self._key_id)
        file = StoredFile(file_id, name, "fine-tune-results", "csv", size, digest, *made)
        with self._records.new(file_id) as directory:
            (directory / CONTENT).write_bytes(content)
            write_json(directory / FACTS, file.to_document())
        return self.get(file_id)

    def get(self, file_id: str) -> StoredFile:
        """Raises NotFound."""
        return self._records.get(file_id)

    def has(self, file_id: str) -> bool:
        """Whether it is there, perhaps damaged."""
        return self._records.has(file_id)

    def present(self, file_ids: set[str]) -> set[str]:
        """Those of them that are there, perhaps damaged."""
        return self._records.present(file_ids)

    def ids(self) -> set[str]:
        """Those of all of them, of damaged ones too."""
        return self._records.ids()

    def list(self) -> list[StoredFile]:
        """All that can be read, newest first; the log names the others."""
        return self._records.list()

    def open(self, file_id: str) -> BinaryIO:
        """The bytes, to read and close; they outlive a delete. Raises NotFound."""
        try:
            return self._records.open(file_id, CONTENT)
        except FileNotFoundError:
            raise _no_file() from None

    def rows(self, file_id: str, ignored: IgnoredFields | None = None) -> Iterator[Row]:
        """The rows in their order; what else they have is counted.

        Raises NotFound at once; CorruptFile, at the latest at the end.
        """
        file = self.get(file_id)
        if file.purpose != "fine-tune":
            raise NotFound("no file of rows has this id")
        return _checked_rows(self.open(file_id), file, ignored)

    def verify(self, file_id: str) -> None:
        """Read all of it. Raises NotFound, CorruptFile."""
        file = self.get(file_id)
        try:
            is_whole = self._records.digest(file_id, CONTENT) == file.sha256
        except OSError:
            raise CorruptFile(f"the content of {file_id} is missing or unreadable") from None
        if not is_whole:
            raise CorruptFile(f"the content of {file_id} no longer matches its digest")

    def delete(self, file_id: str) -> None:
        """Raises NotFound. Who is reading it now reads on."""
        self._records.delete(file_id)

    def clean(self) -> None:
        """Drop what killed processes left, once it is old enough."""
        self._records.clean()


class RowSources:
    """Rows by the id of an uploaded file or of a data set, whichever it is."""

    def __init__(self, datasets: DatasetStore, files: FileStore) -> None:
        self.datasets = datasets
        self.files = files

    @classmethod
    def of(cls, storage: Storage, project: str, key_id: str | None = None) -> Self:
        """Return a project's data sets and files. `key_id` is kept with what is put into them."""
        datasets, files = storage.home.datasets(project), storage.home.files(project)
        return cls(
            DatasetStore(datasets, key_id, storage.at(datasets)), FileStore(files, key_id, storage.at(files))
        )

    def rows(self, source_id: str, ignored: IgnoredFields | None = None) -> CanonicalRows:
        """The rows in their order; what else a file's have is counted.

        Raises NotFound, CorruptDataset, CorruptFile.
        """
        if source_id.startswith(PREFIX):
            return CanonicalRows.of(self.files.rows(source_id, ignored))
        return self.datasets.rows(source_id)


def results_id(job_id: str) -> str:
    """The id of the file that holds the job's results, once there are any."""
    return f"{PREFIX}{job_id}"


class _Hashed:
    """A stream whose bytes are hashed as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.digest.update(line)
        return line


def _checked_rows(content: BinaryIO, file: StoredFile, ignored: IgnoredFields | None) -> Iterator[Row]:
    with content:
        read = _Hashed(content)
        try:
            yield from read_rows(cast("BinaryIO", read), file.format, ignored)
        except (OSError, InvalidInput):
            raise CorruptFile(f"the rows of {file.id} are unreadable") from None
    if read.digest.hexdigest() != file.sha256:
        raise CorruptFile(f"the rows of {file.id} no longer match its digest")


def checked_uploads(storage: Storage) -> Iterator[tuple[str, str | None]]:
    """Where each is, from HOME, and what is wrong with it, and mends it; None: nothing is."""
    home = storage.home
    for project in storage.projects():
        datasets, files = home.datasets(project), home.files(project)
        for root, store, remedy in (
            (datasets, DatasetStore(datasets, bucket=storage.at(datasets)), "delete it, or upload the same rows"),
            (files, FileStore(files, bucket=storage.at(files)), "delete it"),
        ):
            for upload in sorted(store.ids()):
                place = (root / upload).relative_to(home.path).as_posix()
                try:
                    store.verify(upload)
                except NotFound:  # it was deleted just now
                    continue
                except (CorruptDataset, CorruptFile) as error:
                    yield place, f"{error}: {remedy}" if store.has(upload) else None
                else:
                    yield place, None
