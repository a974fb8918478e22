"""The bucket over S3's protocol and over a directory: objects, retries, and failures raised in time."""

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from adapters.errors import BytesUnavailable
from tests.kits.buckets import SECRET, Failure, Proxy

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

pytestmark = pytest.mark.cluster
FAILURES = [failure for failure in get_args(Failure) if failure not in ("", "full")]
"""How requests fail: all of them; a full bucket fails only writes."""


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> "Bucket":
    pytest.importorskip("obstore")
    from adapters.storage.bucket import Bucket as Real

    if request.param == "s3":
        found = request.getfixturevalue("bucket")
        assert isinstance(found, Real)
        return found
    return Real.open(f"file://{tmp_path}/shared/deep")


def content(bucket: "Bucket", key: str) -> bytes:
    (stored,) = (stored for stored in bucket.listed() if stored.key == key)
    copy = io.BytesIO()
    bucket.copy_to(stored, copy)
    return copy.getvalue()


def test_objects_can_be_read_listed_and_deleted(place: "Bucket", tmp_path: Path) -> None:
    from adapters.storage.blobs import Missing

    (tmp_path / "big").write_bytes(big := bytes(range(256)) * (70 << 10))  # more than one part
    place.put("a/one", b"1")
    place.put("a/one", b"uno")
    place.put("ab/two", b"")
    place.under("a").put_file("big", tmp_path / "big")
    assert [(stored.key, stored.size) for stored in place.listed()] == [
        ("a/big", len(big)),
        ("a/one", 3),
        ("ab/two", 0),
    ]
    assert [stored.key for stored in place.listed("a/")] == ["a/big", "a/one"]
    assert [stored.key for stored in place.under("a").listed()] == ["big", "one"]
    assert place.folders() == ["a", "ab"]
    assert place.under("a").folders() == []
    assert (place.get("a/one"), place.get("ab/two")) == (b"uno", b"")
    assert content(place, "a/big") == big
    (one,) = place.listed("a/one") or [s for s in place.listed() if s.key == "a/one"]
    place.delete(["a/one", "never/was"])
    for ask in (lambda: place.get("a/one"), lambda: place.copy_to(one, io.BytesIO())):
        with pytest.raises(Missing):
            ask()
    place.delete(stored.key for stored in place.listed())
    assert place.listed() == []


def test_a_directory_keeps_no_folders_without_files(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from adapters.storage.bucket import Bucket as Real

    root = tmp_path / "shared"
    place = Real.open(f"file://{root}")
    for key in ("jobs/a/rows/data.json", "jobs/a/log", "jobs/b/rows/data.json"):
        place.put(key, b"")
    (root / "jobs/left by a kill/rows").mkdir(parents=True)
    assert place.under("jobs").folders() == ["a", "b"]
    place.delete(["jobs/a/rows/data.json", "jobs/b/rows/data.json"])
    place.now()
    assert place.under("jobs").folders() == ["a"]
    assert sorted(path.name for path in (root / "jobs").iterdir()) == ["a", "left by a kill"]
    assert [path.name for path in (root / "jobs/a").iterdir()] == ["log"]
    assert [path.name for path in root.iterdir()] == ["jobs"]
    place.delete(["jobs/a/log"])
    assert root.is_dir()


def test_now_uses_the_clock_of_modification_times(place: "Bucket") -> None:
    before = place.now()
    place.put("a", b"")
    (stored,) = place.listed()
    assert before <= stored.modified <= place.now()


@pytest.mark.parametrize("failure", FAILURES)
def test_transient_failures_are_retried(failure: Failure, proxied: "Bucket", proxy: Proxy, tmp_path: Path) -> None:
    from adapters.storage.bucket import Bucket as Real

    patient = Real(proxied._store, patience=60.0)  # each attempt has half a second
    patient.put("a", bytes(1000))
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    times = 1 if failure == "stall" else 2
    for ask in (
        lambda: patient.put("b", b"2"),
        lambda: patient.put_file("c", tmp_path / "file"),
        lambda: patient.get("a"),
        lambda: content(patient, "a"),
        lambda: patient.listed(),
        lambda: patient.folders(),
    ):
        proxy.fail(failure, times)
        assert ask() in (None, bytes(1000), [], ["a", "b", "c"]) or len(patient.listed()) == 3
        assert proxy.failures <= 0
    proxy.fail("")
    assert content(patient, "c") == b"x" * 100_000


@pytest.mark.parametrize("failure", ["500", "busy", "cut"])
def test_failures_are_retried_for_all_of_the_patience(failure: Failure, proxied: "Bucket", proxy: Proxy) -> None:
    """obstore retries for half of it, here for half a second."""
    from adapters.storage.bucket import Bucket as Real

    patient = Real(proxied._store, patience=60.0)
    patient.put("a", b"1")
    proxy.fail(failure)
    threading.Timer(2.0, lambda: proxy.fail("")).start()
    assert patient.get("a") == b"1"


@pytest.mark.parametrize("failure", FAILURES)
def test_lasting_failures_are_raised_in_time(
    failure: Failure,
    proxied: "Bucket",
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 0.0)  # each operation tries
    caplog.set_level(logging.DEBUG)
    proxied.put("a", bytes(1000))
    proxy.fail(failure)
    for ask in (lambda: proxied.get("a"), lambda: proxied.listed(), lambda: proxied.put("b", b"")):
        began = time.monotonic()
        with pytest.raises(BytesUnavailable) as caught:
            ask()
        assert caught.value.retry_after > 0
        assert time.monotonic() - began < 3.0, "patience is a second"
    proxy.fail("")
    assert proxied.get("a") == bytes(1000)
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in caplog.text


@pytest.mark.parametrize("failure", ["stall", "cut"])
def test_after_a_failure_without_an_answer_others_fail_at_once_for_a_while(
    failure: Failure, proxied: "Bucket", proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 600.0)
    proxied.put("a", b"1")
    proxy.fail(failure)
    with pytest.raises(BytesUnavailable):
        proxied.under("deep").listed()
    asked = proxy.asked.total()
    others: list[Callable[[], object]] = [lambda: proxied.get("a"), lambda: proxied.put("b", b""), proxied.now]
    for other in others:
        with pytest.raises(BytesUnavailable):
            other()
    assert proxy.asked.total() == asked, "the store wasn't asked again"
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 0.0)
    proxy.fail("")
    assert proxied.get("a") == b"1"
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 600.0)
    assert proxied.get("a") == b"1", "an answer ends the outage"


def test_an_answer_of_500_is_no_outage(proxied: "Bucket", proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may fail one kind of operation, for example writes if it is full."""
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 600.0)
    proxied.put("a", b"1")
    proxy.fail("500")
    with pytest.raises(BytesUnavailable):
        proxied.put("b", b"")
    proxy.fail("")
    assert proxied.get("a") == b"1"


def test_a_full_bucket_refuses_writes_and_allows_reads_and_deletes(proxied: "Bucket", proxy: Proxy) -> None:
    proxied.put("a", b"1")
    proxied.reach(1000)
    assert [stored.key for stored in proxied.listed()] == ["a"]
    proxy.fail("full")
    asks: list[Callable[[], None]] = [lambda: proxied.put("b", b"2"), lambda: proxied.reach(1000)]
    for ask in asks:
        began = time.monotonic()
        with pytest.raises(BytesUnavailable):
            ask()
        assert time.monotonic() - began < 3.0, "patience is a second"
    assert proxied.get("a") == b"1"
    proxied.put("empty", b"")
    proxied.delete(["a"])
    assert [stored.key for stored in proxied.listed()] == ["empty"]


def test_a_missing_bucket_is_not_mistaken_for_missing_objects(aws: str, caplog: pytest.LogCaptureFixture) -> None:
    from adapters.storage.bucket import Bucket

    bucket = Bucket.open("s3://no-such-bucket-here/x", allow_http=True)
    for ask in (lambda: bucket.put("a", b""), lambda: bucket.get("a"), lambda: bucket.listed()):
        caplog.clear()
        with pytest.raises(BytesUnavailable):
            ask()
        (message,) = caplog.messages
        assert message.endswith("Error: NoSuchBucket")
