"""JSONL and CSV files of rows, and data sets made from them: errors by line, or rows that are stored and read back
equal."""

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adapters.errors import FieldError, InvalidInput
from server.training.datasets import DatasetStore
from server.training.row_files import FILE, MAX_FAULTS, Format, read_rows
from server.training.rows import Row, RowNotes, canonical_json, parse_row
from tests.stress.fuzzing.choices import Choices
from tests.stress.fuzzing.target import Target, check_refusal

_FORMATS: tuple[Format, Format] = ("jsonl", "csv")
_STORED, _REPEATED = 16, 32  # one input in this many
_LARGE = 1 << 13


def run(data: bytes) -> str:
    choices = Choices(data)
    kind = choices.below(256)
    file_format = _FORMATS[kind % 2]
    is_stored, is_large = kind // 2 % _STORED == 1, kind // 2 % _REPEATED == 2
    content = choices.rest
    if is_large and content:
        content = content * (_LARGE // len(content))
    rows: list[Row] = []
    notes = RowNotes()
    try:
        rows.extend(read_rows(io.BytesIO(content), file_format, notes))
    except InvalidInput as error:
        check_refusal(error)
        _check_places(error.errors)
        return f"{file_format} refused"
    finally:
        for warning in notes.warnings():
            warning.encode()
    for row in rows:
        assert parse_row(json.loads(canonical_json(row))) == row
    if is_stored and rows:
        _store(content, file_format, rows)
    return f"{file_format} read" if rows else f"{file_format} empty"


def _check_places(faults: Sequence[FieldError]) -> None:
    assert len(faults) <= MAX_FAULTS + 1
    for fault in faults:
        assert fault.loc[0] == FILE
        assert len(fault.loc) == 1 or isinstance(fault.loc[1], int)


def _store(content: bytes, file_format: Format, rows: list[Row]) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        store = DatasetStore(root)
        dataset = store.put(io.BytesIO(content), f"x.{file_format}")
        assert (dataset.num_rows, dataset.bytes) == (len(rows), len(content))
        assert list(store.rows(dataset.id)) == rows
        store.delete(dataset.id)
    finally:
        with suppress(OSError):
            shutil.rmtree(root)


def seeds() -> list[bytes]:
    rows: tuple[object, ...] = (
        {"prompt": "a", "completion": "é"},
        {"text": "😀\n", "id": 7},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"promt": "a", "completion": "b"},
        {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        [{"text": None}, 1e5],
    )
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    turns = json.dumps([{"role": "assistant", "content": "OK"}]).replace('"', '""').encode()
    tables = [
        b'prompt,completion\na,"b ""c"", d"\n\n"e\nf",g\n',
        b"\xef\xbb\xbfcompletion, prompt,id\r\na,b,1\r\n",
        b'messages\n"' + turns + b'"\n',
        b"text\na\n" + b"b\n" * 20,
        b'instruction,input,output,history\na,b,c,"[[""d"", ""e""]]"\n',
        b'conversations\n"' + turns.replace(b"role", b"from").replace(b"content", b"value") + b'"\n',
        b"promt;completion\na;b\n",
        b'text\n"open\n',
    ]
    files = [(0, line) for line in lines] + [(0, b"".join(lines[:3]))] + [(1, table) for table in tables]
    return [bytes([kind + more]) + content for kind, content in files for more in (0, 2, 4)]


TARGET = Target(
    run,
    seeds,
    max_len=2048,
    words=(
        b'{"text": "',
        b'"prompt"',
        b'"completion"',
        b'"messages"',
        b'"role"',
        b'"assistant"',
        b'"content"',
        b'"conversations"',
        b'"from"',
        b'"value"',
        b'"instruction"',
        b'"output"',
        b'"history"',
        b"\\ud800",
        b'""',
        b"\r\n",
        b"\xef\xbb\xbf",
        b"prompt,completion\n",
        b"1e999",
        b"NaN",
        b"\x00",
        b"[[[[",
    ),
)
