"""Data sets: equal rows have one id, writes are atomic, and damage is detected."""

import errno
import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from adapters.errors import InvalidInput, NotFound
from adapters.storage.durable import ABANDONED_AFTER, UNFINISHED
from server.errors import QueueFull
from server.training.datasets import FACTS, ROWS, CorruptDataset, Dataset, DatasetStore
from server.training.rows import CanonicalRows, CompletionRow, Row, TextRow, canonical_json
from tests.kits.buckets import EITHER
from tests.kits.small_disk import refuse_folders

JSONL = b'{"prompt": "200", "completion": "OK"}\n{"prompt": "404", "completion": "Not Found"}\n'
CSV = b"\xef\xbb\xbfcompletion,prompt\r\nOK,200\r\nNot Found,404\r\n"
ROWS_OF_BOTH: list[Row] = [CompletionRow("200", "OK"), CompletionRow("404", "Not Found")]


OpenStore = Callable[[], DatasetStore]


@pytest.fixture(params=EITHER)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Open the store under `tmp_path`, as each process does: on disk, or in a bucket."""
    bucket = None if request.param == "directory" else request.getfixturevalue("bucket").under("datasets")
    return lambda: DatasetStore(tmp_path / "datasets", bucket=bucket)


@pytest.fixture
def store(open_store: OpenStore) -> DatasetStore:
    return open_store()


def put(store: DatasetStore, data: bytes, name: str = "a.jsonl") -> Dataset:
    return store.put(io.BytesIO(data), name)


def files(store: DatasetStore, tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "datasets").glob("*"))


def test_stored_rows_can_be_read(store: DatasetStore, open_store: OpenStore) -> None:
    dataset = put(store, JSONL + b'{"text": "a"}\n')
    assert dataset.id == f"ds-{CanonicalRows.of([*ROWS_OF_BOTH, TextRow('a')]).digest()[:32]}"
    assert (dataset.format, dataset.num_rows, dataset.bytes) == ("jsonl", 3, len(JSONL) + 14)
    assert dataset.kinds == {"completion": 2, "text": 1}
    assert abs(dataset.created_at.timestamp() - time.time()) < 60
    assert store.get(dataset.id) == dataset
    assert list(store.rows(dataset.id)) == [*ROWS_OF_BOTH, TextRow("a")]
    assert store.list() == [dataset]
    again = open_store()
    assert again.list() == [dataset]
    assert json.dumps(dataset.to_document())


def test_the_same_rows_are_one_data_set(store: DatasetStore) -> None:
    first = put(store, JSONL)
    assert put(store, CSV, "b.csv") == first
    assert put(store, JSONL.replace(b"\n", b"\r\n\r\n").replace(b": ", b":")) == first
    assert put(store, JSONL + JSONL).id != first.id
    assert put(store, b"".join(JSONL.splitlines(keepends=True)[::-1])).id != first.id  # the order counts
    assert len(store.list()) == 3


def test_lists_are_newest_first(store: DatasetStore) -> None:
    names = [put(store, b'{"text": "%d"}' % i).id for i in range(3)]
    assert [dataset.id for dataset in store.list()] == names[::-1]


def test_a_deleted_data_set_can_be_uploaded_again(store: DatasetStore, tmp_path: Path) -> None:
    dataset = put(store, JSONL)
    reading = store.lines(dataset.id)
    assert next(reading) == canonical_json(ROWS_OF_BOTH[0])
    store.delete(dataset.id)
    assert list(CanonicalRows(reading)) == ROWS_OF_BOTH[1:]  # open readers continue
    assert store.list() == []
    assert files(store, tmp_path) == []
    for use in (store.get, store.rows, store.delete):
        with pytest.raises(NotFound):
            cast("Callable[[str], object]", use)(dataset.id)
    assert put(store, CSV, "b.csv").id == dataset.id
    assert store.get(dataset.id).format == "csv"


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_delete_works_on_a_full_disk(store: DatasetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = put(store, b'{"text": "a"}')
    with monkeypatch.context() as full:
        refuse_folders(full)
        store.delete(dataset.id)
        with pytest.raises(NotFound):
            store.delete(dataset.id)
    assert store.list() == []
    assert files(store, tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../datasets", "ds-", "ds-" + "G" * 32, "ds-" + "0" * 32 + "\n", "/"]
)
def test_a_path_is_not_accepted_as_an_id(store: DatasetStore, name: str) -> None:
    for use in (store.get, store.rows, store.delete):
        with pytest.raises(NotFound):
            cast("Callable[[str], object]", use)(name)


@pytest.mark.parametrize(
    ("data", "name", "loc"),
    [
        (b"", "a.jsonl", ("file",)),
        (b"\n\n", "a.jsonl", ("file",)),
        (b"text\n", "a.csv", ("file",)),
        (JSONL, "a.txt", ("file",)),
        (JSONL + b"{}", "a.jsonl", ("file", 3, "prompt")),
        (CSV + b"x,\n", "a.csv", ("file", 4, "prompt")),
    ],
)
def test_an_invalid_file_leaves_nothing(
    store: DatasetStore, tmp_path: Path, data: bytes, name: str, loc: tuple[str | int, ...]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        put(store, data, name)
    assert caught.value.errors[0].loc == loc
    assert files(store, tmp_path) == []


ESCAPED = b"text\n" + b"\x01" * 1000 + b"\n" + b"\x02" * 1000 + b"\n"
ESCAPED_BYTES = 2 * len('{"text":""}\n') + 6 * 2000


def test_rows_are_measured_as_stored(store: DatasetStore) -> None:
    """A control character of a CSV is six bytes of JSON."""
    dataset = put(store, ESCAPED, "a.csv")
    assert (dataset.bytes, dataset.stored_bytes) == (len(ESCAPED), ESCAPED_BYTES)
    assert store.get(dataset.id) == dataset
    before = {name: value for name, value in dataset.to_document().items() if name != "rows_bytes"}
    assert Dataset.from_document(before).stored_bytes == len(ESCAPED)


def test_rows_that_grow_too_much_leave_nothing(store: DatasetStore, tmp_path: Path) -> None:
    data = io.BytesIO(ESCAPED)
    with pytest.raises(InvalidInput, match=f"more than {ESCAPED_BYTES - 1} bytes as JSON") as caught:
        store.put(data, "a.csv", max_bytes=ESCAPED_BYTES - 1)
    assert caught.value.errors[0].loc == ("file",)
    assert files(store, tmp_path) == []
    data.seek(0)
    assert store.put(data, "a.csv", max_bytes=ESCAPED_BYTES).stored_bytes == ESCAPED_BYTES


def test_growth_is_reported_while_rows_are_written(
    store: DatasetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.training.datasets._STEP_BYTES", 7000)
    reported: list[int] = []

    def grown(num_bytes: int) -> None:
        reported.append(num_bytes)
        if len(reported) == refused:
            raise QueueFull

    for refused in (1, 2):
        reported.clear()
        with pytest.raises(QueueFull):
            store.put(io.BytesIO(ESCAPED), "a.csv", grown=grown)
        assert reported == [ESCAPED_BYTES] * refused
        assert files(store, tmp_path) == []


class Failing(io.BytesIO):
    """A file that ends in an error."""

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line:
            raise OSError(28, "No space left on device")
        return line


def test_an_interrupted_upload_leaves_nothing(store: DatasetStore, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        store.put(cast("BinaryIO", Failing(JSONL)), "a.jsonl")
    assert files(store, tmp_path) == []


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize("damage", [b"", b'{"prompt":', b'{"text":"a"}\n', JSONL[:-1], b"\xff"])
def test_damaged_rows_are_reported(store: DatasetStore, tmp_path: Path, damage: bytes) -> None:
    dataset = put(store, JSONL)
    (tmp_path / "datasets" / dataset.id / ROWS).write_bytes(damage)
    with pytest.raises(CorruptDataset):
        list(store.rows(dataset.id))


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_missing_rows_and_damaged_facts_are_reported(store: DatasetStore, tmp_path: Path) -> None:
    dataset = put(store, JSONL)
    (tmp_path / "datasets" / dataset.id / ROWS).unlink()
    with pytest.raises(CorruptDataset):
        list(store.rows(dataset.id))
    (tmp_path / "datasets" / dataset.id / FACTS).write_text("{}")
    with pytest.raises(CorruptDataset):
        store.get(dataset.id)


@pytest.mark.parametrize("name", [ROWS, FACTS])
@pytest.mark.parametrize("damage", [b"", b'{"text":"a"}\n', None])
def test_uploading_the_same_rows_repairs_damaged_ones(
    open_store: OpenStore, tmp_path: Path, request: pytest.FixtureRequest, name: str, damage: bytes | None
) -> None:
    dataset = put(open_store(), JSONL)
    if (path := tmp_path / "datasets" / dataset.id / name).exists():
        path.unlink() if damage is None else path.write_bytes(damage)
    else:
        bucket = request.getfixturevalue("bucket")
        (key,) = (stored.key for stored in bucket.listed() if stored.key.endswith(name))
        bucket.delete([key]) if damage is None else bucket.put(key, damage)
    store = open_store()
    assert put(store, JSONL).id == dataset.id
    assert store.verify(dataset.id) == store.get(dataset.id)
    assert [found.id for found in store.list()] == [dataset.id]
    assert list(store.rows(dataset.id)) == ROWS_OF_BOTH
    assert all(not path.name.startswith(".") for path in (tmp_path / "datasets").glob("**/*"))


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize("fails", ["_digest", "_decode"])
def test_rows_that_seem_damaged_for_a_moment_stay(
    store: DatasetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """For example, file descriptors run out, and then space: the existing rows aren't given up."""
    dataset = put(store, JSONL)

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(store, fails, refuse)
        patched.setattr("server.training.datasets.write_json", full)
        with pytest.raises(OSError, match="No space"):
            put(store, JSONL)
    assert store.verify(dataset.id) == dataset
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [dataset.id]


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_a_list_survives_a_folder_that_cannot_be_read(
    store: DatasetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, sound = put(store, JSONL), put(store, b'{"text": "a"}\n')
    is_dir, read_bytes = Path.is_dir, Path.read_bytes

    def fail_for(path: Path) -> None:
        if damaged.id in path.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def looked_at(path: Path) -> bool:
        fail_for(path)
        return is_dir(path)

    def read(path: Path) -> bytes:
        fail_for(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "is_dir", looked_at)
    monkeypatch.setattr(Path, "read_bytes", read)
    assert store.list() == [sound]
    assert store.ids() == {damaged.id, sound.id}


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"[]"])
def test_a_list_survives_a_damaged_data_set(store: DatasetStore, tmp_path: Path, damage: bytes) -> None:
    damaged, sound = put(store, JSONL), put(store, b'{"text": "a"}\n')
    (tmp_path / "datasets" / damaged.id / FACTS).write_bytes(damage)
    assert store.list() == [sound]
    assert store.ids() == {damaged.id, sound.id}
    assert put(store, JSONL).id == damaged.id, "the same rows mend it"
    assert list(store.rows(damaged.id)) == ROWS_OF_BOTH
    (tmp_path / "datasets" / damaged.id / FACTS).write_bytes(damage)
    store.delete(damaged.id)
    assert store.ids() == {sound.id}


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    for age, name in ((0, "new"), (ABANDONED_AFTER + 60, "old")):
        (root / f"{UNFINISHED}{name}").mkdir(parents=True)
        (root / f"{UNFINISHED}{name}-file").touch()
        for path in root.glob(f"*{name}*"):
            os.utime(path, (time.time() - age,) * 2)
    DatasetStore(root).clean()
    assert DatasetStore(root).list() == []
    assert sorted(path.name for path in root.iterdir()) == [f"{UNFINISHED}new", f"{UNFINISHED}new-file"]


def test_concurrent_uploads_store_one_data_set(store: DatasetStore, open_store: OpenStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_store().put(io.BytesIO(JSONL), "a.jsonl"), range(16)))
    assert len({dataset.id for dataset in found}) == 1
    assert [dataset.id for dataset in store.list()] == [found[0].id]
    assert list(store.rows(found[0].id)) == ROWS_OF_BOTH
