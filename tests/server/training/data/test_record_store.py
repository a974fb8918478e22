"""Data sets and files of several machines in one bucket."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters.errors import BytesUnavailable, NotFound
from adapters.storage.durable import write_json
from server.storage.home import Home
from server.storage.places import Storage
from server.training.datasets import FACTS, ROWS, CorruptDataset, DatasetStore
from server.training.files import FileStore, checked_uploads, results_id
from server.training.rows import CanonicalRows
from tests.kits.buckets import Proxy
from tests.server.training.data.test_datasets import JSONL, ROWS_OF_BOTH, put

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

pytestmark = pytest.mark.cluster


def test_other_machines_read_a_stored_data_set(tmp_path: Path, bucket: "Bucket") -> None:
    a, b = (DatasetStore(tmp_path / name / "datasets", bucket=bucket.under("datasets")) for name in "ab")
    dataset = put(a, JSONL)
    assert b.list() == [dataset]
    assert list(b.rows(dataset.id)) == ROWS_OF_BOTH
    assert put(b, JSONL) == dataset
    reading = b.lines(dataset.id)
    next(reading)
    a.delete(dataset.id)
    assert list(CanonicalRows(reading)) == ROWS_OF_BOTH[1:]
    for store in (a, b):
        with pytest.raises(NotFound):
            store.get(dataset.id)
    assert bucket.listed() == []
    assert put(b, JSONL).created_at > dataset.created_at
    assert list(a.rows(dataset.id)) == ROWS_OF_BOTH
    assert [path for name in "ab" for path in (tmp_path / name / "datasets").iterdir()] == []


def test_results_of_the_first_attempt_are_kept_on_all_machines(tmp_path: Path, bucket: "Bucket") -> None:
    a, b = (FileStore(tmp_path / name / "files", bucket=bucket.under("files")) for name in "ab")
    file = a.put_results("job-1", b"step\n1\n")
    assert b.put_results("job-1", b"step\n2\n") == file == b.get(results_id("job-1"))
    with b.open(file.id) as content:
        assert content.read() == b"step\n1\n"


def test_looking_for_several_files_takes_one_listing(tmp_path: Path, patient: "Bucket", proxy: Proxy) -> None:
    store = FileStore(tmp_path, bucket=patient.under("files"))
    there = {store.put_results(f"job-{number}", b"step\n").id for number in range(3)}
    proxy.asked.clear()
    assert store.present(there | {results_id("job-3"), results_id("job-4")}) == there
    assert proxy.asked.total() == 1
    assert store.present({results_id("job-0")}) == {results_id("job-0")}
    assert store.present({results_id("job-4")}) == store.present(set()) == set()


def test_a_late_delete_keeps_a_later_upload(tmp_path: Path, bucket: "Bucket") -> None:
    """The process has looked at the copies, and is stopped before it removes them."""
    from adapters.storage.copies import Copies

    store = DatasetStore(tmp_path, bucket=bucket)
    dataset = put(store, JSONL)
    copies = Copies(bucket, FACTS)
    seen = copies.of(dataset.id)
    store.delete(dataset.id)
    put(store, JSONL)
    copies.remove(seen)
    assert list(store.rows(dataset.id)) == ROWS_OF_BOTH


@pytest.mark.parametrize("lost", [ROWS, FACTS])
def test_an_incomplete_upload_is_not_visible(tmp_path: Path, bucket: "Bucket", lost: str) -> None:
    store = DatasetStore(tmp_path, bucket=bucket)
    dataset = put(store, JSONL)
    (key,) = (stored.key for stored in bucket.listed() if stored.key.endswith(lost))
    bucket.delete([key])
    if lost == FACTS:
        assert store.list() == []
        assert list(store.rows(put(store, JSONL).id)) == ROWS_OF_BOTH
    else:  # only damage causes this
        with pytest.raises(CorruptDataset):
            list(store.rows(dataset.id))
    store.clean()
    assert len(bucket.listed()) == (3 if lost == FACTS else 1), "what may still be on its way stays"


def test_damaged_rows_are_reported(tmp_path: Path, bucket: "Bucket") -> None:
    store = DatasetStore(tmp_path, bucket=bucket)
    dataset = put(store, JSONL)
    (key,) = (stored.key for stored in bucket.listed() if stored.key.endswith(ROWS))
    bucket.put(key, bucket.get(key).replace(b"OK", b"No"))
    with pytest.raises(CorruptDataset):
        list(store.rows(dataset.id))


def test_a_list_survives_a_damaged_data_set(tmp_path: Path, bucket: "Bucket") -> None:
    store = DatasetStore(tmp_path, bucket=bucket)
    damaged, sound = put(store, JSONL), put(store, b'{"text": "a"}\n')
    (key,) = (stored.key for stored in bucket.listed() if damaged.id in stored.key and stored.key.endswith(FACTS))
    bucket.put(key, b"{}")
    store = DatasetStore(tmp_path, bucket=bucket)
    assert store.list() == [sound]
    assert store.ids() == {damaged.id, sound.id}
    assert put(store, JSONL).id == damaged.id, "the same rows mend it"
    assert list(store.rows(damaged.id)) == ROWS_OF_BOTH


def test_uploads_of_other_machines_are_checked(tmp_path: Path, bucket: "Bucket") -> None:
    """This includes projects from which nothing was stored on this machine."""
    one, other = (Storage(Home(tmp_path / machine), bucket) for machine in ("a", "b"))
    ids = {}
    for project in ("default", "acme"):
        root = one.home.datasets(project)
        ids[project] = put(DatasetStore(root, bucket=one.at(root)), JSONL).id
    assert dict(checked_uploads(other)) == {
        f"datasets/{ids['default']}": None,
        f"projects/acme/datasets/{ids['acme']}": None,
    }


def test_two_machines_can_repair_concurrently(tmp_path: Path, bucket: "Bucket") -> None:
    """One removes damaged objects, and nothing that the other is just writing."""
    stores = [DatasetStore(tmp_path / machine, bucket=bucket) for machine in ("a", "b")]
    dataset = put(stores[0], JSONL)
    (key,) = (stored.key for stored in bucket.listed() if stored.key.endswith(ROWS))
    rows = bucket.get(key)
    bucket.put(key, b"{}")
    with stores[0]._renewed(dataset.id) as directory:
        (directory / ROWS).write_bytes(rows)
        write_json(directory / FACTS, dataset.to_document())
        assert put(stores[1], JSONL).id == dataset.id
        stores[1].verify(dataset.id)
    for store in stores:
        store.verify(dataset.id)
        assert list(store.rows(dataset.id)) == ROWS_OF_BOTH


def test_a_failing_repair_removes_nothing(tmp_path: Path, bucket: "Bucket") -> None:
    store = DatasetStore(tmp_path, bucket=bucket)
    dataset = put(store, JSONL)
    before = [stored.key for stored in bucket.listed()]
    with pytest.raises(OSError, match="full"), store._renewed(dataset.id):
        raise OSError("the disk is full")
    assert [stored.key for stored in bucket.listed()] == before
    store.verify(dataset.id)


def test_a_failing_bucket_is_unavailable(
    tmp_path: Path, bucket: "Bucket", proxied: "Bucket", patient: "Bucket", proxy: Proxy
) -> None:
    proxy.fail("500")
    with pytest.raises(BytesUnavailable):
        put(DatasetStore(tmp_path, bucket=proxied), JSONL)
    assert list(tmp_path.iterdir()) == []
    assert bucket.listed() == []
    store = DatasetStore(tmp_path, bucket=patient)
    proxy.fail("cut", 1)
    dataset = put(store, JSONL)
    proxy.fail("half", 1)
    assert list(store.rows(dataset.id)) == ROWS_OF_BOTH
    assert store.list() == [dataset]
