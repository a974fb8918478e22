"""Tests that names and bytes stay consistent during concurrent publications and deletes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from adapters.catalog.catalog import Catalog, Kind, Part, Version
from adapters.catalog.records import Records
from adapters.errors import Conflict, CorruptAdapter, InDoubt, Interrupted, NotFound
from adapters.expression import Term, parse
from adapters.library import Library
from adapters.store.store import AdapterStore
from server.database import connect
from tests.adapters.samples import SHAPE
from tests.server.api.adapters.peft_files import peft_files

BASE_NAME = "tiny-llama"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def engine(tmp_path: Path, database_url: str | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, url=database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def library(tmp_path: Path, store: AdapterStore, engine: sa.Engine) -> Library:
    return Library(Catalog(engine, Records(tmp_path / "adapters")), store, SHAPE, BASE_NAME)


@pytest.fixture
def publish(library: Library, tmp_path: Path) -> "Publish":
    return Publish(library, tmp_path)


class Publish:
    def __init__(self, library: Library, directory: Path) -> None:
        self._library = library
        self._files: dict[int, tuple[bytes, Path]] = {}
        for seed in range(2):
            config, weights = peft_files(seed, shape=SHAPE)
            self._files[seed] = (config, directory / f"weights-{seed}")
            self._files[seed][1].write_bytes(weights)

    def version(self, name: str, seed: int) -> Version:
        return self._library.publish(name, *self._files[seed])

    def __call__(self, name: str, seed: int) -> str:
        return self.version(name, seed).digest


def test_an_upload_reads_no_other_versions(
    library: Library, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading thousands of versions took a second. The warning about equal weights must still be there."""
    for seed in (0, 0, 1):
        publish("a", seed)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(library.catalog, "list", refuse)
    assert publish.version("a", 0).warnings[-1].startswith("its weights are those of a@2")
    assert not any("its weights" in text for text in publish.version("b", 0).warnings)


@pytest.mark.parametrize("error", [Interrupted(), OperationalError("SELECT", {}, OSError("database is locked"))])
def test_a_change_is_reported_if_the_database_fails_after_it(
    library: Library, store: AdapterStore, publish: Publish, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """After the change, the library asks the database whether bytes are still needed, which fails."""
    publish("a", 0)

    def fails(*_: object, **__: object) -> None:
        raise error

    def is_in_doubt(*_: object, **__: object) -> None:
        monkeypatch.setattr(library.catalog, "in_use", fails)
        raise InDoubt

    with monkeypatch.context() as patched:
        patched.setattr(library.catalog, "publish", is_in_doubt)
        with pytest.raises(InDoubt):
            publish("a", 1)
    library.delete("a")
    assert library.page(None, 9, None) == ([], None)
    monkeypatch.undo()
    library.sweep()
    assert store.digests() == []


@pytest.mark.parametrize("error", [Interrupted(), OperationalError("SELECT", {}, OSError("database is locked"))])
def test_a_publication_is_reported_if_the_database_fails_after_it(
    library: Library, publish: Publish, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Otherwise the client would upload it again."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(library.catalog, "twin", fails)
    assert [publish.version("a", 0).version for _ in range(2)] == [1, 2]


def test_a_pin_outlives_a_delete(library: Library, store: AdapterStore, publish: Publish) -> None:
    digest = publish("a", 0)
    pinned = library.pin(parse("a"))
    library.delete("a")
    with pytest.raises(NotFound):
        library.pin(parse("a"))
    store.verify(digest)
    pinned.release()
    pinned.release()  # a second call is a no-op
    with pytest.raises(CorruptAdapter):
        store.load(digest)


def test_publishing_again_revives_pinned_bytes(library: Library, store: AdapterStore, publish: Publish) -> None:
    digest = publish("a", 0)
    pinned = library.pin(parse("a"))
    library.delete("a")
    assert publish("b", 0) == digest
    pinned.release()
    store.verify(digest)


def test_missing_bytes_are_corrupt(library: Library, store: AdapterStore, publish: Publish) -> None:
    store.discard(publish("a", 0))
    with pytest.raises(CorruptAdapter):
        library.open("a", 1)


class RacingCatalog(Catalog):
    """A catalog that deletes the adapter and publishes another one after the first lookup."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self.race: list[Callable[[], object]] = []

    def resolve(self, terms: Sequence[Term], field: str = "adapter") -> tuple[Part, ...]:
        parts = super().resolve(terms, field)
        while self.race:
            self.race.pop()()
        return parts


class BusyCatalog(Catalog):
    """A catalog in which another process composes the name between the check and the publication."""

    def check_kind(self, name: str, kind: Kind) -> None:
        super().check_kind(name, kind)
        if name == "taken" and kind == "adapter":
            self.compose(name, parse("a"))


def test_stored_bytes_are_removed_if_publishing_fails(
    tmp_path: Path, store: AdapterStore, engine: sa.Engine
) -> None:
    library = Library(BusyCatalog(engine), store, SHAPE, BASE_NAME)
    publish = Publish(library, tmp_path)
    kept = publish("a", 0)
    with pytest.raises(Conflict, match="composition"):
        publish("taken", 1)
    assert store.digests() == [kept]
    library.delete("taken")
    with pytest.raises(Conflict):
        publish("taken", 0)  # the same bytes as those of a
    assert store.digests() == [kept]


def test_pin_resolves_again_after_a_concurrent_delete(
    tmp_path: Path, store: AdapterStore, engine: sa.Engine
) -> None:
    catalog = RacingCatalog(engine)
    library = Library(catalog, store, SHAPE, BASE_NAME)
    publish = Publish(library, tmp_path)
    publish("a", 0)
    catalog.race = [lambda: publish("a", 1), lambda: library.delete("a")]  # the last one first
    pinned = library.pin(parse("a"))
    assert pinned.parts[0].version == 2
    store.verify(pinned.parts[0].digest)
    catalog.race = [lambda: library.delete("a")]
    pinned.release()
    with pytest.raises(NotFound, match="no such adapter"):
        library.pin(parse("a"))


def test_readers_never_see_a_partial_adapter(library: Library, store: AdapterStore, publish: Publish) -> None:
    """Two writers publish and delete the same two names and bytes while readers pin and read."""
    publish("x", 0)
    faults: list[BaseException] = []
    stop = threading.Event()

    def write(name: str, seed: int) -> None:
        try:
            for _ in range(8):
                publish(name, seed)
                library.delete(name)
        except BaseException as error:
            faults.append(error)

    def read() -> None:
        try:
            while not stop.is_set():
                for name in ("a", "b", "x"):
                    try:
                        pinned = library.pin(parse(name))
                    except NotFound:
                        assert name != "x"
                        continue
                    store.load(pinned.parts[0].digest)
                    pinned.release()
        except BaseException as error:
            faults.append(error)

    writers = [threading.Thread(target=write, args=args) for args in (("a", 0), ("b", 0), ("c", 1))]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in [*writers, *readers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert faults == []
    store.verify(library.pin(parse("x")).parts[0].digest)
