"""Files as OpenAI's clients expect them: uploaded bytes or a job's results, each under an id of its own.

    <root>/file-.../content      the bytes as uploaded
                    file.json    name, purpose, size, date

Unlike with data sets, two uploads of the same bytes are two files, and a download returns the uploaded bytes. All
rows are checked when they are uploaded, and again when they are read. `delete` doesn't check whether a job uses
the file: callers must check that.
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
from server.training.datasets import CorruptDataset, DatasetStore, MeasuredStream
from server.training.record_store import RecordStore
from server.training.row_files import FILE, Format, read_rows, short_name
from server.training.rows import CanonicalRows, Row, RowNotes
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
    """A stored file is incomplete, unreadable, or no longer matches its digest."""


@dataclass(frozen=True)
class StoredFile:
    """A file's metadata. `format` is the format of the file's rows."""

    id: str
    filename: str
    purpose: Purpose
    format: Format
    bytes: int
    sha256: str
    created_at: datetime  # UTC
    key_id: str | None = None  # the API key that uploaded it, or whose job made it

    def to_document(self) -> dict[str, object]:
        """Return the metadata as a JSON-ready document."""
        return asdict(self) | {"created_at": self.created_at.isoformat()}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read a document that `to_document` returned. Raise ValueError if it is malformed."""
        return read_document(cls, document)


def _no_file() -> NotFound:
    return NotFound("no file has this id")


class FileStore(RecordStore[StoredFile]):
    """The files under one root, or in a bucket. `key_id` is the id of the API key that adds files, if any."""

    def __init__(self, root: Path, key_id: str | None = None, bucket: "Bucket | None" = None) -> None:
        super().__init__(
            root,
            bucket,
            ids=_ID,
            file_name=FACTS,
            decode=StoredFile.from_document,
            missing=_no_file,
            corrupt=CorruptFile,
        )
        self._key_id = key_id

    def put(self, stream: BinaryIO, filename: str) -> StoredFile:
        """Store an upload of training rows. The upload is read as CSV if the name ends in .csv, else as JSONL.

        Raise InvalidInput, with the lines and fields at fault, if rows are invalid, and OSError if the disk is
        full. After any error, nothing is stored.
        """
        name = short_name(filename) or "rows.jsonl"
        file_format: Format = "csv" if name.lower().endswith(".csv") else "jsonl"
        file_id = f"{PREFIX}{secrets.token_hex(12)}"
        with self._new(file_id) as directory:
            content = directory / CONTENT
            with content.open("wb") as copy:
                shutil.copyfileobj(stream, copy, _CHUNK)
            with content.open("rb") as copy:
                read = MeasuredStream(copy)
                if not sum(1 for _ in read_rows(cast("BinaryIO", read), file_format)):
                    raise InvalidInput.of(FILE, "has no rows, or only ones with an empty answer")
            size = content.stat().st_size
            digest = read.digest.hexdigest()
            file = StoredFile(
                file_id, name, "fine-tune", file_format, size, digest, datetime.now(UTC), self._key_id
            )
            write_json(directory / FACTS, file.to_document())
        return file

    def put_results(self, job_id: str, content: bytes) -> StoredFile:
        """Store a job's results, a CSV file, unless an earlier attempt stored them. Return the stored file."""
        file_id = results_id(job_id)
        digest = hashlib.sha256(content).hexdigest()
        name, size = f"{job_id}.csv", len(content)
        made = (datetime.now(UTC), self._key_id)
        file = StoredFile(file_id, name, "fine-tune-results", "csv", size, digest, *made)
        with self._new(file_id) as directory:
            (directory / CONTENT).write_bytes(content)
            write_json(directory / FACTS, file.to_document())
        return self.get(file_id)

    def open(self, file_id: str) -> BinaryIO:
        """Open the content, which stays readable if the file is deleted. Raise NotFound if it doesn't exist."""
        try:
            return self._open(file_id, CONTENT)
        except FileNotFoundError:
            raise _no_file() from None

    def rows(self, file_id: str, notes: RowNotes | None = None) -> Iterator[Row]:
        """Yield the rows in order. Ignored fields and other trainers' formats are noted in `notes`.

        Raise NotFound at once if there is no such file. If the rows are unreadable or don't match their digest,
        raise CorruptFile, but perhaps only after the last row.
        """
        file = self.get(file_id)
        if file.purpose != "fine-tune":
            raise NotFound("no file of rows has this id")
        return _checked_rows(self.open(file_id), file, notes)

    def verify(self, file_id: str) -> None:
        """Raise NotFound if there is no such file, and CorruptFile if its bytes don't match their digest."""
        file = self.get(file_id)
        try:
            is_whole = self._digest(file_id, CONTENT) == file.sha256
        except OSError:
            raise CorruptFile(f"the content of {file_id} is missing or unreadable") from None
        if not is_whole:
            raise CorruptFile(f"the content of {file_id} no longer matches its digest")


class RowSources:
    """The uploaded files and data sets of one project, whose rows are found by id."""

    def __init__(self, datasets: DatasetStore, files: FileStore) -> None:
        self.datasets = datasets
        self.files = files

    @classmethod
    def of(cls, storage: Storage, project: str, key_id: str | None = None) -> Self:
        """Return a project's data sets and files. `key_id` is stored with each new data set and file."""
        datasets, files = storage.home.datasets(project), storage.home.files(project)
        return cls(
            DatasetStore(datasets, key_id, storage.at(datasets)), FileStore(files, key_id, storage.at(files))
        )

    def rows(self, source_id: str, notes: RowNotes | None = None) -> CanonicalRows:
        """Return the rows of a file or data set, in order.

        A file's ignored fields and other trainers' formats are noted in `notes`. For a data set, only the other
        trainer's format of its first upload, if any, is noted. Raise NotFound if there is no such file or data
        set, and CorruptDataset or CorruptFile if it is damaged.
        """
        if source_id.startswith(PREFIX):
            return CanonicalRows.of(self.files.rows(source_id, notes))
        rows, mapping = self.datasets.rows(source_id), self.datasets.get(source_id).mapping
        if notes is not None:
            notes.mapping = notes.mapping or mapping
        return rows


def results_id(job_id: str) -> str:
    """Return the id of the file with the job's results."""
    return f"{PREFIX}{job_id}"


def _checked_rows(content: BinaryIO, file: StoredFile, notes: RowNotes | None) -> Iterator[Row]:
    with content:
        read = MeasuredStream(content)
        try:
            yield from read_rows(cast("BinaryIO", read), file.format, notes)
        except (OSError, InvalidInput):
            raise CorruptFile(f"the rows of {file.id} are unreadable") from None
    if read.digest.hexdigest() != file.sha256:
        raise CorruptFile(f"the rows of {file.id} no longer match its digest")


def checked_uploads(storage: Storage) -> Iterator[tuple[str, str | None]]:
    """Verify every data set and file. Yield (path below HOME, fault with a remedy, or None if intact) for each.

    All bytes are read, from this machine or from the bucket.
    """
    home = storage.home
    for project in storage.projects():
        sources = RowSources.of(storage, project)
        for root, store, remedy in (
            (home.datasets(project), sources.datasets, "delete it, or upload the same rows"),
            (home.files(project), sources.files, "delete it"),
        ):
            for upload in sorted(store.ids()):
                place = (root / upload).relative_to(home.path).as_posix()
                try:
                    store.verify(upload)
                except NotFound:  # deleted meanwhile
                    continue
                except (CorruptDataset, CorruptFile) as error:
                    yield place, f"{error}: {remedy}" if store.has(upload) else None
                else:
                    yield place, None
