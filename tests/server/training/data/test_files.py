"""Uploaded files: unchanged, one object per upload, and whole or missing."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import InvalidInput, NotFound
from server.training.datasets import DatasetStore
from server.training.files import CONTENT, FACTS, CorruptFile, FileStore, RowSources, results_id
from server.training.rows import CompletionRow, TextRow
from tests.kits.buckets import EITHER

CONTENTS = b'{"completion": "Not Found", "prompt":"404 "}\n\n{"text": "caf\xc3\xa9"}\n'
ROWS = [CompletionRow("404 ", "Not Found"), TextRow("café")]


OpenStore = Callable[[], FileStore]


@pytest.fixture(params=EITHER)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Open the store under `tmp_path`, as each process does: on disk, or in a bucket."""
    bucket = None if request.param == "directory" else request.getfixturevalue("bucket").under("files")
    return lambda: FileStore(tmp_path / "files", bucket=bucket)


@pytest.fixture
def store(open_store: OpenStore) -> FileStore:
    return open_store()


def test_uploaded_bytes_are_read_back(store: FileStore, open_store: OpenStore) -> None:
    file = store.put(io.BytesIO(CONTENTS), "codes.jsonl")
    for reader in (store, open_store()):  # the second as after a restart
        assert reader.get(file.id) == file
        assert reader.has(file.id)
        with reader.open(file.id) as content:
            assert content.read() == CONTENTS
        assert list(reader.rows(file.id)) == ROWS
    assert (file.filename, file.purpose, file.bytes) == ("codes.jsonl", "fine-tune", len(CONTENTS))


def test_the_same_bytes_twice_are_two_files(store: FileStore) -> None:
    first, second = (store.put(io.BytesIO(CONTENTS), "codes.jsonl") for _ in range(2))
    assert first.id != second.id
    assert store.list() == [second, first]
    store.delete(first.id)
    assert store.list() == [second]
    assert list(store.rows(second.id)) == ROWS


@pytest.mark.parametrize(
    ("filename", "content", "kept"),
    [
        ("a.csv", b"prompt,completion\n404 ,Not Found\n", "a.csv"),
        ("A.CSV", b"completion,prompt\nNot Found,404 \n", "A.CSV"),
        (
            "upload",
            b'{"prompt": "404 ", "completion": "Not Found"}',
            "upload",
        ),  # clients name bytes this way
        ("../../etc/a.txt", b'{"prompt": "404 ", "completion": "Not Found"}', "a.txt"),
        ("", b'{"prompt": "404 ", "completion": "Not Found"}', "rows.jsonl"),
    ],
)
def test_formats_and_names(store: FileStore, filename: str, content: bytes, kept: str) -> None:
    file = store.put(io.BytesIO(content), filename)
    assert file.filename == kept
    assert list(store.rows(file.id)) == ROWS[:1]


@pytest.mark.parametrize(
    ("content", "loc"),
    [
        (b"", ("file",)),
        (b"\n\n", ("file",)),
        (b'{"text": "a"}\n{"text": ""}\n', ("file", 2, "text")),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', ("file", 1, "messages", 0, "role")),
    ],
)
def test_invalid_rows_leave_nothing(
    store: FileStore, tmp_path: Path, content: bytes, loc: tuple[str | int, ...]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.put(io.BytesIO(content), "a.jsonl")
    assert caught.value.errors[0].loc == loc
    assert list((tmp_path / "files").iterdir()) == []


def test_results_are_stored_once(store: FileStore) -> None:
    file = store.put_results("job-1", b"step\n1\n")
    again = store.put_results("job-1", b"step\n2\n")
    assert again == file == store.get(results_id("job-1"))
    assert file.purpose == "fine-tune-results"
    with store.open(file.id) as content:
        assert content.read() == b"step\n1\n"
    with pytest.raises(NotFound):
        store.rows(file.id)


@pytest.mark.parametrize("file_id", ["file-no", "file-../files", "..", "", "ds-" + "0" * 32])
def test_unknown_files_are_not_found(store: FileStore, file_id: str) -> None:
    for look in (store.get, store.open, store.rows, store.delete):
        with pytest.raises(NotFound):
            look(file_id)


def test_a_reader_outlives_a_delete(store: FileStore) -> None:
    file = store.put(io.BytesIO(CONTENTS), "codes.jsonl")
    with store.open(file.id) as content:
        store.delete(file.id)
        assert content.read() == CONTENTS
    assert not store.has(file.id)


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_what_a_killed_process_left_is_removed_when_it_is_old(store: FileStore, tmp_path: Path) -> None:
    root = tmp_path / "files"
    for name, age in ((".unfinished-file-1", 7200), (".unfinished-file-2", 60)):
        (root / name).mkdir(parents=True)
        then = (root / name).stat().st_mtime - age
        os.utime(root / name, (then, then))
    (root / "file-half").mkdir()  # its metadata is missing: it never existed
    FileStore(root).clean()
    assert FileStore(root).list() == []
    assert sorted(path.name for path in root.iterdir()) == [".unfinished-file-2", "file-half"]


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_damage_is_reported(store: FileStore, tmp_path: Path) -> None:
    file = store.put(io.BytesIO(CONTENTS), "codes.jsonl")
    place = tmp_path / "files" / file.id
    (place / CONTENT).write_bytes(CONTENTS[:-20])
    with pytest.raises(CorruptFile):
        list(store.rows(file.id))
    (place / FACTS).write_text(json.dumps({"id": file.id}))
    with pytest.raises(CorruptFile):
        store.get(file.id)
    other = store.put(io.BytesIO(CONTENTS), "codes.jsonl")
    assert store.list() == [other]
    assert store.ids() == {file.id, other.id}


def test_rows_are_found_by_the_id_of_a_file_or_a_data_set(store: FileStore, tmp_path: Path) -> None:
    datasets = DatasetStore(tmp_path / "datasets")
    sources = RowSources(datasets, store)
    file = store.put(io.BytesIO(CONTENTS), "codes.jsonl")
    dataset = datasets.put(io.BytesIO(CONTENTS), "codes.jsonl")
    assert list(sources.rows(file.id)) == list(sources.rows(dataset.id)) == ROWS
    for unknown in ("file-no", "ds-no", "no"):
        with pytest.raises(NotFound):
            sources.rows(unknown)
