"""Uploaded data sets: checked rows under an id that follows from them, published by one rename.

    <root>/ds-<32 hex digits>/rows.jsonl      a line of canonical JSON for each row
                              dataset.json    counts, dates, the digest of all rows

The id begins the digest of the rows in their order, so that the same rows are one data set, from whichever format
they came; the first upload's facts stay. Several processes may use one root. Who uses a data set is the caller's
to know: `delete` asks nobody.
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
from server.training.record_store import record_store
from server.training.row_files import FILE, Format, format_of, read_rows, short_name
from server.training.rows import CanonicalRows, IgnoredFields, canonical_json, kind_of
from server.training.spec import read_document

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

ROWS = "rows.jsonl"
FACTS = "dataset.json"
_ID = re.compile(r"ds-[0-9a-f]{32}")
_STEP_BYTES = 16 << 20  # that may be written before it is told how many there are
_TOO_LARGE = (
    "its rows come to more than {} bytes as JSON, in which a control character takes six, a line break or a quote "
    "two: leave out what isn't needed, or upload it in parts"
)


class CorruptDataset(SmoloraError):
    """Stored rows are missing, or no longer match the digest that names them."""


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set. `bytes`, `format` and `filename` are the first upload's.

    Its rows are kept as JSON, which may take several times a CSV's bytes: a control character takes six.
    """

    id: str
    format: Format
    num_rows: int
    bytes: int
    created_at: datetime  # UTC
    kinds: Mapping[str, int]  # rows of each shape: completion, messages, text
    digest: str  # as `CanonicalRows.digest` has it
    filename: str | None = None  # what it was before they were kept
    key_id: str | None = None  # of the API key that uploaded it
    rows_bytes: int | None = None  # of the rows as they are kept; None: of before that was counted

    @property
    def stored_bytes(self) -> int:
        """What it takes up, as far as that is known."""
        return self.bytes if self.rows_bytes is None else self.rows_bytes

    def to_document(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self) | {"created_at": self.created_at.isoformat(), "kinds": dict(self.kinds)}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """What `to_document` made. Raises ValueError on anything else."""
        return read_document(cls, document)


def no_dataset() -> NotFound:
    """Return the error for an id that no data set of the project has."""
    hint = Hint("list_datasets", "GET /datasets lists them")
    return NotFound(f"no data set has this id: {hint}", hint=hint)


class DatasetStore:
    """The data sets under one root, or in a bucket. Thread-safe. `key_id` is kept with what is put into it."""

    def __init__(self, root: Path, key_id: str | None = None, bucket: "Bucket | None" = None) -> None:
        self._root = root
        self._key_id = key_id
        self._records = record_store(
            root,
            _ID,
            FACTS,
            Dataset.from_document,
            no_dataset,
            CorruptDataset,
            bucket,
        )

    def put(
        self,
        stream: BinaryIO,
        filename: str,
        ignored: IgnoredFields | None = None,
        *,
        max_bytes: int | None = None,
        grown: Callable[[int], None] | None = None,
    ) -> Dataset:
        """Check all rows and store them; the format is the file name's ending. What else they have is counted.

        As they are stored they may have `max_bytes`; `grown` is told now and then, and at the end, how many bytes
        there are by now, and may raise. Raises InvalidInput with the lines and fields at fault, OSError where the
        disk is full. Nothing stays then, whoever raised.
        """
        file_format = format_of(filename)
        counted = _Counted(stream)
        self._root.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=self._root)
        unfinished = Path(name)
        try:
            kinds: Counter[str] = Counter()
            digest = hashlib.sha256()
            num_bytes, told = 0, 0
            with open(handle, "wb") as file:
                for row in read_rows(cast("BinaryIO", counted), file_format, ignored):
                    line = canonical_json(row) + b"\n"
                    num_bytes += len(line)
                    if max_bytes is not None and num_bytes > max_bytes:
                        raise InvalidInput.of(FILE, _TOO_LARGE.format(max_bytes))
                    if grown is not None and num_bytes - told >= _STEP_BYTES:
                        grown(num_bytes)
                        told = num_bytes
                    digest.update(line)
                    file.write(line)
                    kinds[kind_of(row)] += 1
            if not kinds:
                raise InvalidInput.of(FILE, "has no rows")
            if grown is not None:
                grown(num_bytes)
            dataset = Dataset(
                id=f"ds-{digest.hexdigest()[:32]}",
                format=file_format,
                num_rows=kinds.total(),
                bytes=counted.num_bytes,
                created_at=datetime.now(UTC),
                kinds=dict(sorted(kinds.items())),
                digest=digest.hexdigest(),
                filename=short_name(filename),
                key_id=self._key_id,
                rows_bytes=num_bytes,
            )
            return self._publish(unfinished, dataset)
        finally:
            with suppress(OSError):  # `clean` takes it then
                unfinished.unlink(missing_ok=True)

    def get(self, dataset_id: str) -> Dataset:
        """Raises NotFound."""
        return self._records.get(dataset_id)

    def has(self, dataset_id: str) -> bool:
        """Whether it is there, perhaps damaged."""
        return self._records.has(dataset_id)

    def ids(self) -> set[str]:
        """Those of all of them, of damaged ones too."""
        return self._records.ids()

    def list(self) -> list[Dataset]:
        """All that can be read, newest first; the log names the others."""
        return self._records.list()

    def rows(self, dataset_id: str) -> CanonicalRows:
        """The rows in their order. Raises NotFound, CorruptDataset."""
        return CanonicalRows(self.lines(dataset_id))

    def lines(self, dataset_id: str) -> Iterator[bytes]:
        """Each row's canonical JSON. Raises NotFound at once; CorruptDataset, at the latest at the end."""
        return _checked_lines(partial(self._records.open, dataset_id, ROWS), self.get(dataset_id))

    def verify(self, dataset_id: str) -> Dataset:
        """What is known of it, once all of it was read. Raises NotFound, CorruptDataset."""
        dataset = self.get(dataset_id)
        try:
            is_whole = self._records.digest(dataset_id, ROWS) == dataset.digest
        except OSError:
            raise CorruptDataset(f"the rows of {dataset_id} are missing or unreadable") from None
        if not is_whole:
            raise CorruptDataset(f"the rows of {dataset_id} no longer match its digest")
        return dataset

    def delete(self, dataset_id: str) -> None:
        """Raises NotFound. Who is reading its rows now reads on."""
        self._records.delete(dataset_id)

    def clean(self) -> None:
        """Drop what killed processes left, once it is old enough."""
        self._records.clean()

    def _publish(self, rows: Path, dataset: Dataset) -> Dataset:
        place = self._records.new(dataset.id)
        try:
            return self.verify(dataset.id)
        except NotFound:
            pass
        except CorruptDataset:  # of which these rows are whole
            place = self._records.renewed(dataset.id)
        with place as directory:
            os.replace(rows, directory / ROWS)
            write_json(directory / FACTS, dataset.to_document())
        return self._records.find(dataset.id) or dataset  # another process may have been quicker


class _Counted:
    """A stream whose bytes are counted as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.num_bytes = 0
        self._stream = stream

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.num_bytes += len(line)
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
