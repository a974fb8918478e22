"""Uploaded data sets: checked rows, stored under an id that is derived from the rows.

    <root>/ds-<32 hex digits>/rows.jsonl      a line of canonical JSON for each row
                              dataset.json    counts, dates, the digest of all rows

The id contains the first digits of the digest of all rows, in order. So uploading the same rows again, even in
another format, gives the same data set, with the metadata of the first upload. `delete` doesn't check whether a
job uses the data set: callers must check that.
"""

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from adapters.errors import Hint, InvalidInput, NotFound, SmoloraError
from adapters.storage.durable import UNFINISHED, write_json
from server.training.formats import RowFormat
from server.training.record_store import RecordStore
from server.training.row_files import FILE, Format, format_of, read_rows, short_name
from server.training.rows import CanonicalRows, RowNotes, canonical_json, kind_of
from server.training.spec import read_document

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

ROWS = "rows.jsonl"
FACTS = "dataset.json"
_ID = re.compile(r"ds-[0-9a-f]{32}")
_STEP_BYTES = 16 << 20  # written between two calls of `grown`
_TOO_LARGE = (
    "its rows take more than {} bytes as JSON, in which a control character takes six bytes, a line break or a "
    "quote two: leave out what isn't needed, or upload it in parts"
)


class CorruptDataset(SmoloraError):
    """Stored rows are missing, or no longer match their digest."""


@dataclass(frozen=True)
class Dataset:
    """A data set's metadata. `bytes`, `format` and `filename` describe the first upload of these rows.

    Rows are stored as JSON, which may take several times as many bytes as the upload's CSV.
    """

    id: str
    format: Format
    num_rows: int
    bytes: int
    created_at: datetime  # UTC
    kinds: Mapping[str, int]  # rows of each shape: completion, messages, text
    digest: str  # as `CanonicalRows.digest` returns it
    filename: str | None = None
    key_id: str | None = None  # the API key that uploaded it
    rows_bytes: int | None = None  # size of the rows as stored
    mapping: RowFormat | None = None  # the first upload's, as in `RowNotes`

    @property
    def stored_bytes(self) -> int:
        """The size of the rows as stored; if it is unknown, the size of the upload."""
        return self.bytes if self.rows_bytes is None else self.rows_bytes

    def to_document(self) -> dict[str, object]:
        """Return the metadata as a JSON-ready document."""
        return asdict(self) | {"created_at": self.created_at.isoformat(), "kinds": dict(self.kinds)}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read a document that `to_document` returned. Raise ValueError if it is malformed."""
        return read_document(cls, document)


def no_dataset() -> NotFound:
    """Return the error to raise if the project has no data set with the requested id."""
    hint = Hint("list_datasets", "GET /datasets lists them")
    return NotFound(f"no data set has this id: {hint}", hint=hint)


class DatasetStore(RecordStore[Dataset]):
    """The data sets under one root, or in a bucket. `key_id` is the id of the API key that adds data sets."""

    def __init__(self, root: Path, key_id: str | None = None, bucket: "Bucket | None" = None) -> None:
        super().__init__(
            root,
            bucket,
            ids=_ID,
            file_name=FACTS,
            decode=Dataset.from_document,
            missing=no_dataset,
            corrupt=CorruptDataset,
        )
        self._root = root
        self._key_id = key_id

    def put(
        self,
        stream: BinaryIO,
        filename: str,
        notes: RowNotes | None = None,
        *,
        max_bytes: int | None = None,
        grown: Callable[[int], None] | None = None,
    ) -> Dataset:
        """Check all rows and store them. The format follows from the file name's ending.

        Ignored fields and other trainers' formats are noted in `notes`. The stored rows may take at most
        `max_bytes`. `grown` is called every 16 MiB and at the end, with the number of bytes stored so far, and may
        raise. Raise InvalidInput, with the lines and fields at fault, if rows are invalid, and OSError if the disk
        is full. After any error, nothing is stored.
        """
        file_format = format_of(filename)
        notes = notes or RowNotes()
        upload = MeasuredStream(stream)
        self._root.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=self._root)
        unfinished = Path(name)
        try:
            kinds: Counter[str] = Counter()
            digest = hashlib.sha256()
            num_bytes, reported = 0, 0
            with open(handle, "wb") as file:
                for row in read_rows(cast("BinaryIO", upload), file_format, notes):
                    line = canonical_json(row) + b"\n"
                    num_bytes += len(line)
                    if max_bytes is not None and num_bytes > max_bytes:
                        raise InvalidInput.of(FILE, _TOO_LARGE.format(max_bytes))
                    if grown is not None and num_bytes - reported >= _STEP_BYTES:
                        grown(num_bytes)
                        reported = num_bytes
                    digest.update(line)
                    file.write(line)
                    kinds[kind_of(row)] += 1
            if not kinds:
                raise InvalidInput.of(FILE, "has no rows, or only ones with an empty answer")
            if grown is not None:
                grown(num_bytes)
            dataset = Dataset(
                id=f"ds-{digest.hexdigest()[:32]}",
                format=file_format,
                num_rows=kinds.total(),
                bytes=upload.num_bytes,
                created_at=datetime.now(UTC),
                kinds=dict(sorted(kinds.items())),
                digest=digest.hexdigest(),
                filename=short_name(filename),
                key_id=self._key_id,
                rows_bytes=num_bytes,
                mapping=notes.mapping,
            )
            return self._publish(unfinished, dataset)
        finally:
            with suppress(OSError):  # `clean` removes it later
                unfinished.unlink(missing_ok=True)

    def rows(self, dataset_id: str) -> CanonicalRows:
        """Return the rows in order. Raise NotFound if the id is unknown, CorruptDataset if rows are damaged."""
        return CanonicalRows(self.lines(dataset_id))

    def lines(self, dataset_id: str) -> Iterator[bytes]:
        """Yield each row's canonical JSON. Raise NotFound at once if there is no such data set.

        If the rows don't match their digest, raise CorruptDataset, but perhaps only after the last row.
        """
        return _checked_lines(partial(self._open, dataset_id, ROWS), self.get(dataset_id))

    def verify(self, dataset_id: str) -> Dataset:
        """Compare all rows with their digest, and return the data set's metadata.

        Raise NotFound if there is no such data set, and CorruptDataset if the rows don't match.
        """
        dataset = self.get(dataset_id)
        try:
            is_whole = self._digest(dataset_id, ROWS) == dataset.digest
        except OSError:
            raise CorruptDataset(f"the rows of {dataset_id} are missing or unreadable") from None
        if not is_whole:
            raise CorruptDataset(f"the rows of {dataset_id} no longer match its digest")
        return dataset

    def _publish(self, rows: Path, dataset: Dataset) -> Dataset:
        place = self._new(dataset.id)
        try:
            return self.verify(dataset.id)
        except NotFound:
            pass
        except CorruptDataset:  # the new rows repair it
            place = self._renewed(dataset.id)
        with place as directory:
            os.replace(rows, directory / ROWS)
            write_json(directory / FACTS, dataset.to_document())
        return self._find(dataset.id) or dataset  # another process may have stored it first


class MeasuredStream:
    """A stream that counts and hashes its bytes as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.num_bytes = 0
        self.digest = hashlib.sha256()
        self._stream = stream

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.num_bytes += len(line)
        self.digest.update(line)
        return line


def _checked_lines(open_rows: Callable[[], BinaryIO], dataset: Dataset) -> Iterator[bytes]:
    digest = hashlib.sha256()
    try:
        with open_rows() as file:
            for line in file:
                digest.update(line)
                yield line.removesuffix(b"\n")
    except OSError:
        raise CorruptDataset(f"the rows of {dataset.id} are missing or unreadable") from None
    if digest.hexdigest() != dataset.digest:
        raise CorruptDataset(f"the rows of {dataset.id} no longer match its digest")
