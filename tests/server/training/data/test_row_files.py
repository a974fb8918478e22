"""Files of rows: what was written is read, what is wrong is named by line and field, and nothing runs away."""

import csv
import gzip
import io
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidInput
from server.training.row_files import (
    MAX_FAULTS,
    MAX_LINE,
    MAX_LINES,
    Format,
    format_of,
    read_csv,
    read_jsonl,
    read_rows,
)
from server.training.rows import CompletionRow, MessagesRow, Row, RowNotes, TextRow, canonical_json
from tests.server.training.data.test_rows import ROWS, TEXT

Loc = tuple[str | int, ...]


def jsonl(data: bytes) -> list[Row]:
    return list(read_jsonl(io.BytesIO(data)))


def csv_rows(data: bytes) -> list[Row]:
    return list(read_csv(io.BytesIO(data)))


def faults(data: bytes, file_format: Format) -> list[tuple[Loc, str]]:
    with pytest.raises(InvalidInput) as caught:
        list(read_rows(io.BytesIO(data), file_format))
    return [(error.loc, error.message) for error in caught.value.errors]


@given(st.lists(ROWS), st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans())
def test_jsonl_reads_what_was_written(
    rows: list[Row], ascii_only: bool, end: bytes, bom: bool, last: bool
) -> None:
    documents = [json.loads(canonical_json(row)) for row in rows]
    data = end.join(json.dumps(document, ensure_ascii=ascii_only).encode() for document in documents)
    assert jsonl(b"\xef\xbb\xbf" * bom + data + end * last) == rows


@given(
    st.lists(st.tuples(TEXT, TEXT)), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.booleans()
)
def test_csv_reads_what_was_written(
    pairs: list[tuple[str, str]], end: str, bom: bool, swapped: bool, all_quoted: bool
) -> None:
    left_out = "\0" if all_quoted else "\0\r"  # the module's writer may leave a carriage return unquoted
    kept = [["".join(c for c in text if c not in left_out) or "x" for text in pair] for pair in pairs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    writer.writerows(row[::-1] if swapped else row for row in [["prompt", "completion"], *kept])
    data = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
    assert csv_rows(data) == [CompletionRow(prompt, completion) for prompt, completion in kept]


def test_the_other_csv_columns() -> None:
    assert csv_rows(b'text\n"a ""b"", c"\n\nd\n') == [TextRow('a "b", c'), TextRow("d")]
    row = csv_rows(b'messages\n"[{""role"": ""assistant"", ""content"": ""OK""}]"\n')[0]
    assert isinstance(row, MessagesRow)
    assert row.messages[0].content == "OK"


def test_a_schema_in_a_csv_is_json_or_ignored() -> None:
    data = b'prompt,completion,schema\na,b,"{""type"": ""object""}"\na,b,CREATE TABLE t\na,b,\n'
    assert csv_rows(data) == [CompletionRow("a", "b", '{"type":"object"}'), *[CompletionRow("a", "b")] * 2]
    ((found, said),) = faults(b'prompt,completion,schema\na,b,"{""type"": 1"\n', "csv")
    assert (found, said[:26]) == (("file", 2, "schema"), "line 2: schema is not JSON")


def test_rows_of_several_shapes_may_share_a_jsonl_file() -> None:
    data = b'\n{"text": "a"}\n  \n{"prompt": "b", "completion": "c"}\n\n'
    assert jsonl(data) == [TextRow("a"), CompletionRow("b", "c")]


def test_an_empty_file_has_no_fault() -> None:
    assert jsonl(b"") == jsonl(b"\n\n") == csv_rows(b"text\n") == []


@pytest.mark.parametrize(
    ("line", "loc", "message"),
    [
        (b'{"text": ""}', ("file", 2, "text"), "line 2: text must not be empty"),
        (b'{"text": 1}', ("file", 2, "text"), "line 2: text must be a text"),
        (b'{"prompt": "a"}', ("file", 2, "completion"), "line 2: completion is missing"),
        (
            b'{"promt": "a", "completion": "b"}',
            ("file", 2, "prompt"),
            "line 2: prompt is missing, and promt is no field: did you mean prompt?",
        ),
        (
            b'{"text": "a", "prompt": "a", "completion": "b"}',
            ("file", 2, "text"),
            "line 2: text doesn't go with prompt and completion: a row has",
        ),
        (b'[{"text": "a"}]', ("file", 2, "row"), "line 2: row must be an object, not a list: a row has"),
        (
            b'{"messages": [{"role": "x", "content": ""}]}',
            ("file", 2, "messages", 0, "role"),
            "line 2: messages.0.role must be system",
        ),
        (b'"text"', ("file", 2, "row"), "line 2: row must be an object"),
        (
            b'{"prompt": "a", "completion": "b", "schema": {"$ref": "https://example.com/a"}}',
            ("file", 2, "schema"),
            "line 2: schema has the $ref https://example.com/a: it must be a path within the schema",
        ),
        (b'{"text": "a"', ("file",), "line 2: is not JSON: Expecting ',' delimiter at character"),
        (b'{"text": "a"} {}', ("file",), "line 2: is not JSON: Extra data at character 15"),
        (b'{"text": NaN}', ("file",), "line 2: is not JSON: NaN is no JSON number"),
        (b'\xef\xbb\xbf{"text": "a"}', ("file",), "line 2: is not JSON: Unexpected UTF-8 BOM"),
        (b'{"text": -Infinity}', ("file",), "line 2: is not JSON: -Infinity is no JSON number"),
        (b'{"text": "a", "text": "b"}', ("file",), "line 2: has the key 'text' twice"),
        (b'{"text": "\\ud800"}', ("file", 2, "text"), "line 2: text has half of a surrogate pair"),
        (b'{"text": "a\0"}', ("file",), "line 2: has a NUL byte, at byte 12"),
        (b'{"text": "\xff"}', ("file",), "line 2: is not UTF-8, at byte 11"),
        (b'{"text": "\xed\xa0\x80"}', ("file",), "line 2: is not UTF-8, at byte 11"),
        (b'{"text": "a\tb"}', ("file",), "line 2: is not JSON: Invalid control character at character 12"),
        (b"[" * 100_000, ("file",), "line 2: is nested too deeply"),
        (b'{"text":' * 100_000, ("file",), "line 2: is nested too deeply"),
        (b"9" * 100_000, ("file",), "line 2: holds a number that is too long"),
        (b"x" * (MAX_LINE + 1), ("file",), f"line 2: is longer than {MAX_LINE} bytes"),
    ],
)
def test_a_bad_line_is_named(line: bytes, loc: Loc, message: str) -> None:
    ((found, said),) = faults(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n', "jsonl")
    assert found == loc
    assert said.startswith(message)


@pytest.mark.parametrize(
    ("data", "loc", "message"),
    [
        (b"", ("file",), "line 1: the first line must name the columns"),
        (b"\n", ("file",), "line 1: the first line must name the columns"),
        (b"text,text\na,b\n", ("file",), "line 1: the first line names the column text twice"),
        (b"prompt,completion,text\na,b,c\n", ("file",), "line 1: the first line must name the columns"),
        (
            b"prompt;completion\na;b\n",
            ("file",),
            "line 1: the first line must name the columns prompt and completion, or messages, or text, "
            "separated by commas",
        ),
        (
            b"promt,completion\na,b\n",
            ("file",),
            "line 1: the first line names promt: did you mean prompt? The columns are prompt and completion",
        ),
        (b"prompt\na\n", ("file",), "line 1: the first line must name the columns"),
        (
            b"ticket,team\na,b\n",
            ("file",),
            "line 1: the first line must name the columns prompt and completion, or messages, or text; to learn "
            "team from ticket, name these columns completion and prompt",
        ),
        (
            b"id,ticket,team\n1,a,b\n",
            ("file",),
            "line 1: the first line must name the columns prompt and completion, or messages, or text; it has "
            "id, ticket, team: name the column to learn completion, and the column to learn it from prompt",
        ),
        (b"output,instruction,output\na,b,c\n", ("file",), "line 1: the first line names the column output twice"),
        (b"prompt,completion\na,b\na\n", ("file",), "line 3: has 1 column, but the first line names 2"),
        (b"prompt,completion\na,b,c\n", ("file",), "line 2: has 3 columns, but the first line names 2"),
        (b"prompt,completion\na,\n", ("file", 2, "completion"), "line 2: completion must not be empty"),
        (b'text\n"a\n\nb"\n""\n', ("file", 5, "text"), "line 5: text must not be empty"),
        (b'text\n"a"b\n', ("file",), "line 2: is not CSV: ',' expected after '\"'"),
        (b'text\nx\n"a\nb\n', ("file",), "line 3: is not CSV: a quote that opens here isn't closed"),
        (b"text\na\rb\n", ("file",), "line 2: is not CSV: a carriage return outside quotes"),
        (b"text\na\0b\n", ("file",), "line 2: has a NUL byte, at byte 2"),
        (b'text\n"a\n\xc3("\n', ("file",), "line 3: is not UTF-8, at byte 1"),
        (b"text\n" + b"a" * 131_073, ("file",), "line 2: is not CSV: field larger than field limit"),
        (b"messages\n[]\n", ("file", 2, "messages"), "line 2: messages must be a list of turns"),
        (b"messages\nhello\n", ("file", 2, "messages"), "line 2: messages is not JSON: Expecting value"),
        (b"\xff\xfet\0e\0x\0t\0\n\0", ("file",), "line 1: is not text: it is UTF-16: save it as UTF-8"),
    ],
)
def test_a_bad_record_is_named(data: bytes, loc: Loc, message: str) -> None:
    ((found, said),) = faults(data, "csv")
    assert found == loc
    assert said.startswith(message)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ("text\nä\n".encode("utf-16-le"), None),
        ("\ufefftext\nä\n".encode("utf-16-le"), "UTF-16"),
        ("\ufefftext\nä\n".encode("utf-16-be"), "UTF-16"),
        (gzip.compress(b'{"text": "a"}\n', mtime=0), "gzip"),
        (b"PK\x03\x04\x14\0\x06\0", "Excel"),
        (b"PK\x03\x04\n\0", "Excel"),  # a folder comes first, or what isn't compressed
        (b"PAR1\x15\x04\x15\0", "Parquet"),
        (b"PAR1\x15" + b"\x04" * MAX_LINE, "Parquet"),
    ],
)
@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_binary_files_are_named_by_their_format(data: bytes, remedy: str | None, file_format: Format) -> None:
    (loc, said), *others = faults(data, file_format)
    assert loc == ("file",)
    if remedy is None:
        assert said.startswith(("line 1: has a NUL byte, at byte ", "line 1: is not UTF-8, at byte "))
        assert ": it is " not in said
    else:
        assert said.startswith("line 1: is not text: it is ")
        assert remedy in said
        assert not others


def test_a_column_may_have_the_name_that_parquet_begins_with() -> None:
    assert csv_rows(b"PAR1,text\na,b\n") == [TextRow("b")]


ARRAY_REMEDY = (
    "begins an array, but each line must be a row: `jq -c '.[]'` makes the lines of a .jsonl file of an array"
)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'[{"text": "a"}]', f"line 1: {ARRAY_REMEDY}"),
        (b'\xef\xbb\xbf[{"text": "a"}]', f"line 1: {ARRAY_REMEDY}"),
        (b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', f"line 1: {ARRAY_REMEDY}"),
        (b'[{"text": "a"},\n{"text": "b"}]\n', f"line 1: {ARRAY_REMEDY}"),
        (b'\n \n[{"text": "a"}]', f"line 3: {ARRAY_REMEDY}"),
        (b'\xef\xbb\xbf\n[\n{"text": "a"}]', f"line 2: {ARRAY_REMEDY}"),
        (b'[{"text": "%s"}]' % (b"a" * MAX_LINE), f"line 1: is longer than {MAX_LINE} bytes and {ARRAY_REMEDY}"),
        (
            b'\xef\xbb\xbf[{"text": "%s"}]' % ("ä" * MAX_LINE).encode(),
            f"line 1: is longer than {MAX_LINE} bytes and {ARRAY_REMEDY}",
        ),
        (b'\n[{"text": "%s"}]' % (b"a" * MAX_LINE), f"line 2: is longer than {MAX_LINE} bytes and {ARRAY_REMEDY}"),
    ],
)
def test_an_array_gets_advice_on_making_lines(data: bytes, fault: str) -> None:
    assert faults(data, "jsonl") == [(("file",), fault)]


def test_a_list_of_turns_is_not_taken_for_an_array_of_rows() -> None:
    turns = b'[{"content": "{a}", "role": "user"}, {"role": "assistant", "content": "b"}]\n'
    for data in (turns, b"\n" + turns, turns * 2):
        for _, said in faults(data, "jsonl"):
            assert "row must be an object, not a list: a row has" in said
            assert "jq" not in said


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rows.json", "jq"),
        ("rows.JSONL.gz", "unpack"),
        ("rows.tsv", "commas"),
        ("a.xlsx", "CSV"),
        ("a.parquet", "pandas"),
    ],
)
def test_unsupported_formats_get_advice(name: str, remedy: str) -> None:
    with pytest.raises(InvalidInput, match=rf"its name must end in \.jsonl or \.csv: .*{remedy}"):
        format_of(name)


def test_other_fields_are_ignored_and_counted() -> None:
    notes = RowNotes()
    lines = b'{"text": "a", "id": 1}\n{"text": "b", "id": 2, "page": "x"}\n{"text": "c"}\n'
    assert list(read_rows(io.BytesIO(lines), "jsonl", notes)) == [TextRow("a"), TextRow("b"), TextRow("c")]
    assert notes.warnings() == ["fields that are not trained on were ignored: id in 2 rows, page in 1 row"]
    notes = RowNotes()
    rows = b",completion,id,prompt\n0,b,7,a\n"
    assert list(read_rows(io.BytesIO(rows), "csv", notes)) == [CompletionRow("a", "b")]
    assert notes.warnings() == ["fields that are not trained on were ignored: (no name) in 1 row, id in 1 row"]


def test_very_many_other_fields_are_counted_together() -> None:
    notes = RowNotes()
    line = json.dumps({"text": "a", **{f"field_{i}": i for i in range(1000)}}).encode()
    assert len(list(read_rows(io.BytesIO(line), "jsonl", notes))) == 1
    (warning,) = notes.warnings()
    assert warning.endswith("field_7 in 1 row, 992 times others")


def test_reading_that_ends_early_says_so() -> None:
    found = faults(b"[]\n" * 100, "jsonl")
    assert len(found) == MAX_FAULTS + 1
    assert found[-1] == (("file",), "reading ended here: lines after these may be at fault, too")


def test_good_lines_between_bad_ones_are_read_on() -> None:
    found = faults(b'{}\n\xff\n{"text": "a"}\n{"text": ""}\n', "jsonl")
    assert [said.split(":")[0] for _, said in found] == ["line 1", "line 2", "line 4"]


def test_no_fault_quotes_the_file() -> None:
    """Except names of columns, which are needed to rename them."""
    data = b'{"prompt": "secret", "completion": ""}\n{"secret\n"secret"\n\xffsecret\n'
    assert "secret" not in str(faults(data, "jsonl"))
    assert "secret" not in str(faults(b"text\n" + data, "csv"))


@pytest.mark.parametrize(
    ("name", "expected"), [("a.jsonl", "jsonl"), ("B.CSV", "csv"), ("a.csv.jsonl", "jsonl"), ("../x/y.csv", "csv")]
)
def test_the_name_decides_the_format(name: str, expected: str) -> None:
    assert format_of(name) == expected


@pytest.mark.parametrize("name", ["", "csv", ".csv", "a.json", "a.jsonl.gz", "a.csv/"[:-1] + " "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        format_of(name)
    assert caught.value.errors[0].loc == ("file",)


class Endless(io.RawIOBase):
    """A file of `num_bytes` that is never held: a head, then one chunk over and over. Counts what is read."""

    def __init__(self, chunk: bytes, num_bytes: int = 1 << 28, head: bytes = b"") -> None:
        self.num_read = 0
        self._left = num_bytes
        self._chunks = memoryview(chunk * -(-(1 << 16) // len(chunk)))
        self._next = memoryview(head or chunk)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._next[: min(len(buffer), self._left)]
        buffer[: len(piece)] = piece
        self._next = self._next[len(piece) :] or self._chunks
        self._left -= len(piece)
        self.num_read += len(piece)
        return len(piece)


HOSTILE: dict[str, tuple[Format, bytes, bytes]] = {  # format, head, what follows over and over
    "one line of 256 MiB": ("jsonl", b"", b"a" * (1 << 16)),
    "one string of 256 MiB": ("jsonl", b'{"text": "', b"a" * (1 << 16)),
    "blank lines": ("jsonl", b"", b"\n"),
    "empty objects": ("jsonl", b"", b"{}\n"),
    "NUL": ("jsonl", b"", b"\0" * (1 << 16)),
    "NUL lines": ("jsonl", b"", b"\0\n"),
    "no UTF-8": ("jsonl", b"", b"\xff\n"),
    "nested lists": ("jsonl", b"", b"[" * (1 << 19) + b"\n"),
    "wide lists": ("jsonl", b"", b"[" + b"[]," * (1 << 18) + b"[]]\n"),
    "wide objects": ("jsonl", b"", b"{" + b",".join(b'"%d":0' % i for i in range(90_000)) + b"}\n"),
    "tiny rows": ("jsonl", b"", b'{"text":"a"}\n'),
    "an open quote": ("csv", b'text\n"', b"a\n"),
    "an open quote in a long line": ("csv", b'text\n"', b"a" * (1 << 16)),
    "a record of quoted fields": ("csv", b'text\n"', b'a\n","'),
    "a record of long fields": ("csv", b'text\n"', b"a" * 1000 + b'\n","'),
    "escaped quotes": ("csv", b'text\n"', b'""' * (1 << 15)),
    "commas": ("csv", b"text\n", b"," * (1 << 16)),
    "rows of commas": ("csv", b"prompt,completion\n", b",\n"),
    "blank records": ("csv", b"text\n", b"\n"),
    "short records": ("csv", b"text\n", b"a\n"),
    "a header without end": ("csv", b"", b"text," * (1 << 12)),
    "carriage returns": ("csv", b"text\n", b"\r" * (1 << 16)),
}


def read_hostile(name: str) -> None:
    file_format, head, chunk = HOSTILE[name]
    stream = Endless(chunk, head=head)
    with pytest.raises(InvalidInput) as caught:
        for _ in read_rows(io.BufferedReader(stream), file_format):
            pass
    assert len(caught.value.errors) <= MAX_FAULTS + 1
    assert stream.num_read <= 4 * MAX_LINE  # of 256 MiB


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_bounded_time(name: str) -> None:
    started = time.perf_counter()
    read_hostile(name)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "name", ["one line of 256 MiB", "wide objects", "a record of long fields", "commas", "NUL"]
)
def test_hostile_files_take_bounded_memory(name: str) -> None:
    tracemalloc.start()
    try:
        read_hostile(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * MAX_LINE


def test_the_most_lines() -> None:
    rows = sum(1 for _ in read_jsonl(io.BytesIO(b'{"text":"a"}\n' * MAX_LINES)))
    assert rows == MAX_LINES
    assert "line 200001" in faults(b"\n" * (MAX_LINES + 1), "jsonl")[0][1]


def test_the_longest_line() -> None:
    text = "a" * (MAX_LINE - len('{"text":""}\n'))
    assert jsonl(b'{"text":"%s"}\n' % text.encode()) == [TextRow(text)]
    assert "longer" in faults(b'{"text":"%sa"}\n' % text.encode(), "jsonl")[0][1]
