"""Readers of uploaded files of rows: JSONL, or CSV with column names in the first line.

A file is read line by line and never held in memory as a whole. A line (in CSV, a record) has at most `MAX_LINE`
bytes. A file has at most `MAX_LINES` lines, including blank ones. Reading ends after `MAX_FAULTS` errors, or when
the invalid lines together exceed `MAX_LINE` characters. Each error names the field, and the line where its record
begins.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import BinaryIO, Literal, NoReturn, get_args

from adapters import strict_json
from adapters.errors import FieldError, InvalidInput
from server.system.messages import plural
from server.training.formats import ALPACA, CONVERSATIONS, format_of_fields
from server.training.rows import (
    DECISION,
    FIELDS,
    MAX_NAMED,
    SCHEMA,
    EmptyAnswer,
    Row,
    RowNotes,
    misspelt,
    parse_row,
    shown,
)

Format = Literal["jsonl", "csv"]
MAX_LINE = 1 << 20
MAX_LINES = 200_000
MAX_FAULTS = 20
MAX_FILENAME = 255
_JSON_COLUMNS = ("messages", CONVERSATIONS, "history")
_CSV_FAULTS = {
    "new-line character seen in unquoted field": "a carriage return outside quotes",
    "unexpected end of data": "a quote that opens here isn't closed",
}
_ENDINGS = {
    "json": "`jq -c '.[]'` makes the lines of a .jsonl file of an array",
    "parquet": "pandas' `to_json(orient='records', lines=True)` makes a .jsonl file of it",
    "tsv": "save the table with commas",
    "xlsx": "save the sheet as CSV UTF-8",
    "gz": "unpack it first",
    "zip": "unpack it first",
}
_BEGINNINGS = {
    codecs.BOM_UTF16_LE: "it is UTF-16: save it as UTF-8 (Excel's CSV UTF-8)",
    codecs.BOM_UTF16_BE: "it is UTF-16: save it as UTF-8 (Excel's CSV UTF-8)",
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
    b"PK\x03\x04": "it is a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
    b"PAR1\x15": f"it is a Parquet file: {_ENDINGS['parquet']}",
}
"""The first bytes of files that aren't text, and how to convert them."""
_ARRAY = re.compile(r"\s*\[\s*(\{|$)")  # of objects
_OF_ARRAY = f"begins an array, but each line must be a row: {_ENDINGS['json']}"
FILE = "file"
"""The location of errors that belong to no field. It is also the name of an upload's form field."""


def format_of(filename: str) -> Format:
    """Return the format that the name's ending says. Raise InvalidInput if the ending is unknown."""
    ending = PurePath(filename).suffix.lower().removeprefix(".")
    for known in get_args(Format):
        if ending == known:
            found: Format = known
            return found
    remedy = f": {_ENDINGS[ending]}" if ending in _ENDINGS else ""
    raise InvalidInput.of(FILE, f"its name must end in .jsonl or .csv{remedy}")


def short_name(filename: str) -> str:
    """Return an upload's name as it is stored: without folders, and cut if it is long."""
    return PurePath(filename).name[:MAX_FILENAME]


def read_rows(stream: BinaryIO, file_format: Format, notes: RowNotes | None = None) -> Iterator[Row]:
    """Yield the rows of a file. Ignored fields, other trainers' formats and dropped rows are noted in `notes`.

    Rows for which `parse_row` raises EmptyAnswer are dropped. Other errors are collected, and raised as one
    InvalidInput when reading ends. Until then valid rows are yielded, even after an error. So don't use any row
    before the iterator has ended.
    """
    return read_jsonl(stream, notes) if file_format == "jsonl" else read_csv(stream, notes)


def read_jsonl(stream: BinaryIO, notes: RowNotes | None = None) -> Iterator[Row]:
    """Yield the rows of a file with a JSON object on each line, in UTF-8; skip blank lines. See `read_rows`."""
    faults = _Faults()
    lines = _Lines(stream, faults)
    for line in lines:
        if not line.strip():
            continue
        if lines.is_first and _begins_array_of_rows(line):
            faults.stop(lines.number, _OF_ARRAY)
        try:
            row = parse_row(_json(line.rstrip(), FILE), notes)
        except EmptyAnswer:
            continue
        except InvalidInput as error:
            faults.add(lines.number, error, len(line))
            continue
        yield row
    faults.raise_if_any()


def read_csv(stream: BinaryIO, notes: RowNotes | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV file, comma-separated, quoted by `"`, in UTF-8; skip blank records. See `read_rows`.

    Columns may be in any order, and other columns are allowed. The columns `messages`, `conversations` and
    `history` have JSON, and so may `schema`. A field has at most 131,072 characters, the csv module's limit.
    """
    faults = _Faults()
    lines = _Lines(stream, faults, stops=True)
    records = _records(lines, faults)
    columns = next(records, [])
    names = tuple(name.strip() for name in columns)
    if (fault := _header_fault(names)) is not None:
        faults.stop(1, f"the first line {fault}")
    for fields in records:
        if not fields:
            continue
        try:
            if len(fields) != len(names):
                raise InvalidInput.of(
                    FILE, f"has {plural(len(fields), 'column')}, but the first line names {len(names)}"
                )
            texts = dict(zip(names, fields, strict=True))
            parsed = {name: _json(texts[name], name) for name in _JSON_COLUMNS if texts.get(name)}
            if texts.get(SCHEMA, "").startswith("{"):  # other schemas may be a database's
                parsed[SCHEMA] = _json(texts[SCHEMA], SCHEMA)
            row = parse_row({**texts, **parsed}, notes)
        except EmptyAnswer:
            continue
        except InvalidInput as error:
            faults.add(lines.first, error, sum(map(len, fields)))
            continue
        yield row
    faults.raise_if_any()


def _header_fault(names: Sequence[str]) -> str | None:
    """Return what is wrong with a CSV file's column names, or None if nothing is. The names must fit exactly one
    kind of row.
    """
    needed = {name for shape in FIELDS for name in shape}
    if needed.isdisjoint(names) and set(DECISION) <= set(names):
        needed = set(DECISION)
    found = format_of_fields(set(names))
    if found is not None:
        needed = set(ALPACA) if found == "alpaca" else {CONVERSATIONS}
    there = {name for name in names if name in needed}
    if found is not None or there in map(set, (*FIELDS, DECISION)):
        twice = next((name for name in sorted(there) if names.count(name) > 1), None)
        return None if twice is None else f"names the column {twice} twice"
    choices = ", or ".join(" and ".join(shape) for shape in FIELDS)
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        return f"must name the columns {choices}, separated by commas: save the table with commas"
    strange = [name for name in names if name not in needed]
    for name in sorted(needed - there):
        if (meant := misspelt(strange, name)) is not None:
            return f"names {shown(meant)}: did you mean {name}? The columns are {choices}"
    return f"must name the columns {choices}{_renaming(names)}"


def _renaming(names: Sequence[str]) -> str:
    """Return text that lists the unsuitable columns and advises how to rename them."""
    if len(names) == 2:
        return f"; to learn {shown(names[1])} from {shown(names[0])}, name these columns completion and prompt"
    listed = ", ".join(map(shown, names[:MAX_NAMED]))
    advice = "name the column to learn completion, and the column to learn it from prompt"
    return f"; it has {listed}: {advice}" if names else ""


def _begins_array_of_rows(line: str) -> bool:
    """Return whether a file with this first line seems to be a JSON array of rows."""
    if not _ARRAY.match(line):
        return False
    try:
        value = strict_json.parse(line)
    except strict_json.BadJsonError:
        return True  # the array goes on after the line
    return isinstance(value, list) and "role" not in value[0]


def _json(text: str, field: str) -> object:
    """Parse JSON. Raise InvalidInput, which names `field`, if the text is malformed."""
    try:
        return strict_json.parse(text)
    except strict_json.BadJsonError as error:
        raise InvalidInput.of(field, str(error)) from None


class _Faults:
    """The errors found in a file so far."""

    def __init__(self) -> None:
        self._found: list[FieldError] = []
        self._length = 0

    def add(self, line: int, error: InvalidInput, length: int = 0) -> None:
        """Add the errors of a line of `length` characters. At a limit, raise InvalidInput with all errors."""
        self._length += length
        for fault in error.errors:
            if fault.loc == (FILE,):
                self._found.append(FieldError((FILE,), f"line {line}: {fault.message}"))
            else:
                field = ".".join(map(str, fault.loc))
                self._found.append(FieldError((FILE, line, *fault.loc), f"line {line}: {field} {fault.message}"))
        if len(self._found) >= MAX_FAULTS or self._length > MAX_LINE:
            more = FieldError((FILE,), "reading ended here: lines after these may be at fault, too")
            raise InvalidInput([*self._found[:MAX_FAULTS], more])

    def stop(self, line: int, message: str) -> NoReturn:
        """Raise InvalidInput with this error and all earlier ones, since the rest of the file can't be read."""
        self.add(line, InvalidInput.of(FILE, message))
        raise InvalidInput(self._found)

    def raise_if_any(self) -> None:
        if self._found:
            raise InvalidInput(self._found[:MAX_FAULTS])


class _Lines:
    """A file's lines as text, with line breaks. Invalid lines are skipped or, if `stops`, end the reading."""

    def __init__(self, stream: BinaryIO, faults: _Faults, stops: bool = False) -> None:
        self.number = 0
        """The number of the line that was read last."""
        self.first = 1
        """The line number, from 1, where the record begins that `begin_record` started."""
        self._num_blank = 0
        self._record_bytes = 0
        self._stream = stream
        self._faults = faults
        self._stops = stops

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            line = self._stream.readline(MAX_LINE + 1)
            if not line:
                raise StopIteration
            self.number += 1
            if self.number > MAX_LINES:
                self._faults.stop(self.number, f"a file may have {MAX_LINES} lines, blank ones too")
            is_long = len(line) > MAX_LINE
            if self.number == 1:
                remedies = [said for begins, said in _BEGINNINGS.items() if line.startswith(begins)]
                if remedies:
                    self._faults.stop(1, f"is not text: {remedies[0]}")
                line = line.removeprefix(codecs.BOM_UTF8)
            self._num_blank += not line.strip()
            if is_long:
                is_array = self.is_first and _begins_array_of_rows(line.decode(errors="replace"))
                more = f" and {_OF_ARRAY}" if is_array else ""
                self._faults.stop(self.number, f"is longer than {MAX_LINE} bytes{more}")
            self._record_bytes += len(line)
            if self._stops and self._record_bytes > MAX_LINE:
                self._faults.stop(self.first, f"the record is longer than {MAX_LINE} bytes: is a quote left open?")
            if b"\0" in line:
                fault = f"has a NUL byte, at byte {line.index(0) + 1}"
            else:
                try:
                    return line.decode()
                except UnicodeDecodeError as error:
                    fault = f"is not UTF-8, at byte {error.start + 1}"
            if self._stops:
                self._faults.stop(self.number, fault)
            self._faults.add(self.number, InvalidInput.of(FILE, fault))

    @property
    def is_first(self) -> bool:
        """Whether the line that was read last is the file's first line that isn't blank."""
        return self.number == self._num_blank + 1

    def begin_record(self) -> None:
        """Start a record at the next line, and count the record's bytes from that line on."""
        self.first = self.number + 1
        self._record_bytes = 0


def _records(lines: _Lines, faults: _Faults) -> Iterator[list[str]]:
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # the csv module's own messages are written for programmers
            reason = _CSV_FAULTS.get(str(error).partition(" - ")[0], str(error))
            faults.stop(lines.first, f"is not CSV: {reason}")
        yield fields
