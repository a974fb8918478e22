"""Pins never wait, not even for a discard of the same bytes that waits itself; and named bytes stay."""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters.errors import CorruptAdapter
from adapters.store.store import AdapterStore
from tests.adapters.samples import sample_adapter
from tests.adapters.store.conftest import ADAPTER, DIGEST

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

OTHER = sample_adapter(seed=1)
SOON = 45.0
"""Seconds in which any non-blocking call ends, however busy the machine is."""


class Gate:
    """A gate at which callers wait until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)

    def unwanted(self, digest: str) -> bool:
        """Return, after a delay, that no version has the digest, like a slow catalog."""
        self()
        return False


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that is left without waiting for a hanging thread."""
    pool = ThreadPoolExecutor(4)
    yield pool
    pool.shutdown(wait=False)


@contextmanager
def another_process_publishes(store: AdapterStore) -> Iterator[None]:
    """Let another process publish slowly, as on a busy disk, during the block."""
    with open(store._root / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pin_and_let_go(store: AdapterStore, *digests: str) -> None:
    store.pin(digests)
    assert store.let_go(digests) is None
    store.pin(digests)
    store.unpin(digests)


def discard(store: AdapterStore, gate: Gate) -> None:
    store.discard(DIGEST, gate.unwanted)


def discard_and_unpin(store: AdapterStore, gate: Gate) -> None:
    store.pin([DIGEST])
    store.discard(DIGEST, gate.unwanted)
    store.unpin([DIGEST])


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize("remove", [discard, discard_and_unpin])
def test_pins_do_not_wait_while_the_catalog_is_asked(
    remove: Callable[[AdapterStore, Gate], None],
    store: AdapterStore,
    place: Path,
    gate: Gate,
    pool: ThreadPoolExecutor,
) -> None:
    store.put(ADAPTER)
    store.put(OTHER)
    removing = pool.submit(remove, store, gate)
    assert gate.reached.wait(SOON)
    pool.submit(pin_and_let_go, store, OTHER.weights.digest, "f" * 64).result(SOON)
    assert not removing.done()
    gate.opened.set()
    removing.result(SOON)
    assert not place.exists()
    store.verify(OTHER.weights.digest)


@pytest.mark.parametrize("remove", [discard, discard_and_unpin])
def test_pins_do_not_wait_while_another_process_publishes(
    remove: Callable[[AdapterStore, Gate], None],
    store: AdapterStore,
    place: Path,
    gate: Gate,
    pool: ThreadPoolExecutor,
) -> None:
    store.put(ADAPTER)
    gate.opened.set()
    with another_process_publishes(store):
        removing = pool.submit(remove, store, gate)
        with pytest.raises(TimeoutError):  # it has reached the lock
            removing.result(0.1)
        pool.submit(pin_and_let_go, store, OTHER.weights.digest).result(SOON)
        assert not removing.done()
    removing.result(SOON)
    assert not place.exists()


@pytest.mark.cluster
def test_pins_do_not_wait_for_an_eviction(
    bucket: "Bucket", gate: Gate, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    from adapters.store.bucket_store import BucketAdapterStore

    class Slow(BucketAdapterStore):
        def _set_aside(self, place: Path) -> list[Path]:
            if place.exists():  # otherwise it has just been put
                gate()
            return super()._set_aside(place)

    store = Slow(tmp_path / "adapters", bucket.under("adapters"), cache_bytes=1)
    with store.publishing(ADAPTER, lambda _: True):
        pass
    loading = pool.submit(lambda: [store.put(OTHER), store.load(OTHER.weights.digest)])
    assert gate.reached.wait(SOON)
    pool.submit(store.pin, ["f" * 64]).result(SOON)
    gate.opened.set()
    loading.result(SOON)
    assert store._here() == [OTHER.weights.digest]


def test_a_pin_during_the_catalogs_answer_keeps_bytes_until_the_last_unpin(
    store: AdapterStore, place: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    store.put(ADAPTER)
    discarding = pool.submit(store.discard, DIGEST, gate.unwanted)
    assert gate.reached.wait(SOON)
    pool.submit(store.pin, [DIGEST, DIGEST]).result(SOON)
    gate.opened.set()
    discarding.result(SOON)
    store.verify(DIGEST)
    store.unpin([DIGEST])
    store.verify(DIGEST)
    store.unpin([DIGEST])
    assert not place.exists()


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_a_new_pin_during_the_last_unpins_discard_keeps_bytes(
    store: AdapterStore, place: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    store.put(ADAPTER)
    store.pin([DIGEST])
    store.discard(DIGEST, gate.unwanted)
    removal = store.let_go([DIGEST])
    assert removal is not None
    store.verify(DIGEST)  # it stays until the removal is called
    removing = pool.submit(removal)
    assert gate.reached.wait(SOON)
    store.pin([DIGEST])
    gate.opened.set()
    removing.result(SOON)
    store.verify(DIGEST)
    store.unpin([DIGEST])
    assert not place.exists()


def test_a_pin_after_the_removal_began_finds_no_half_removed_bytes(
    tmp_path: Path, place: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """No name refers to the bytes any more, as the pinning thread finds afterwards."""

    class Slow(AdapterStore):
        def _set_aside(self, place: Path) -> list[Path]:
            if place.exists():  # otherwise it has just been put
                gate()
            return super()._set_aside(place)

    store = Slow(tmp_path / "adapters")
    store.put(ADAPTER)
    discarding = pool.submit(store.discard, DIGEST)
    assert gate.reached.wait(SOON)
    pool.submit(store.pin, [DIGEST]).result(SOON)
    putting = pool.submit(store.put, ADAPTER)
    store.verify(DIGEST)
    gate.opened.set()
    discarding.result(SOON)
    putting.result(SOON)
    store.discard(DIGEST)
    store.verify(DIGEST)  # they were put in the meantime, and are pinned
    store.unpin([DIGEST])
    assert not place.exists()
    with pytest.raises(CorruptAdapter):
        store.load(DIGEST)


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_a_failing_catalog_keeps_bytes_but_no_pins(store: AdapterStore, place: Path) -> None:
    def broken(digest: str) -> bool:
        raise OSError("no such database")

    digests = [DIGEST, OTHER.weights.digest]
    for adapter in (ADAPTER, OTHER):
        store.put(adapter)
    store.pin(digests)
    for digest in digests:
        store.discard(digest, broken)
    with pytest.raises(OSError, match="no such database"):
        store.unpin(digests)
    for digest in digests:
        store.verify(digest)
        store.discard(digest)
    assert store.digests() == []


def test_bytes_stay_if_their_name_is_found_after_the_pin(
    store: AdapterStore, place: Path, pool: ThreadPoolExecutor
) -> None:
    """One thread publishes and deletes repeatedly, and all others use what they find."""
    named: set[str] = set()
    stop, found = threading.Event(), threading.Event()

    def use() -> int:
        num_found = 0
        while not stop.is_set():
            store.pin([DIGEST])
            if DIGEST in named:
                num_found += 1
                found.set()
                store.verify(DIGEST)
                time.sleep(0.001)  # it is deleted in the meantime
                store.load(DIGEST)
            if (removal := store.let_go([DIGEST])) is not None:
                removal()
        return num_found

    using: list[Future[int]] = [pool.submit(use) for _ in range(3)]
    try:
        for _ in range(4 if store.is_in_bucket else 40):
            with store.publishing(ADAPTER, named.__contains__):
                named.add(DIGEST)
            assert found.wait(SOON)
            named.clear()
            found.clear()
            store.discard(DIGEST, named.__contains__)
    finally:
        stop.set()
    assert sum(future.result(60) for future in using) > 0
    assert not place.exists()
