"""A resolved expression is reused until the next commit."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog, Part
from adapters.errors import CorruptAdapter, Interrupted, NotFound
from adapters.expression import Term, parse
from adapters.library import Library
from adapters.names import Viewpoint
from adapters.store.store import AdapterStore
from server.api.deps import RecentPins
from server.database import FILE_NAME, Commits, connect
from server.database.file import driver
from server.database.silence import Outage
from tests.adapters.samples import SHAPE
from tests.server.api.adapters.peft_files import peft_files


class CountingCatalog(Catalog):
    """A catalog that counts resolutions over all projects, and records the threads that ask what is in use."""

    num = 0
    asked_in: ClassVar[list[int]] = []

    def resolve(self, terms: Sequence[Term], field: str = "adapter") -> tuple[Part, ...]:
        CountingCatalog.num += 1
        return super().resolve(terms, field)

    def in_use(self, digest: str) -> bool:
        CountingCatalog.asked_in.append(threading.get_ident())
        return super().in_use(digest)


class Registry:
    """A library on a database that is opened twice, as if `other` were another process."""

    def __init__(self, home: Path) -> None:
        self.engines = connect(home), connect(home)
        self.store = AdapterStore(home / "adapters")
        self.library, self.other = (self._library(engine) for engine in self.engines)
        self.commits = Commits(home)
        self.home = home

    def _library(self, engine: sa.Engine) -> Library:
        return Library(CountingCatalog(engine), self.store, SHAPE, "tiny-llama")

    def publish(self, name: str, seed: int, by: Library | None = None) -> str:
        config, weights = peft_files(seed, shape=SHAPE)
        (self.home / "weights").write_bytes(weights)
        return (by or self.library).publish(name, config, self.home / "weights").digest

    def close(self) -> None:
        self.commits.close()
        for engine in self.engines:
            engine.dispose()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    CountingCatalog.num = 0
    CountingCatalog.asked_in.clear()
    return Registry(tmp_path)


async def ask(pins: RecentPins, library: Library, expression: str) -> tuple[list[str], int]:
    """Return the digests, and the number of resolutions that they took."""
    before = CountingCatalog.num
    pinned = await pins.pin(library, parse(expression), "adapter")
    digests = [part.digest for part in pinned.parts]
    for digest in digests:
        library.store.verify(digest)
    pinned.release()
    return digests, CountingCatalog.num - before


@pytest.mark.anyio
async def test_expression_is_resolved_once_until_the_next_commit(registry: Registry) -> None:
    pins, library = RecentPins(registry.commits.now), registry.library
    first, second = registry.publish("a", 0), registry.publish("b", 1)
    blend = "a*0.5+b*0.5"
    assert await ask(pins, library, "a") == ([first], 2)
    assert await ask(pins, library, blend) == ([first, second], 2)
    for _ in range(3):
        assert await ask(pins, library, "a") == ([first], 0)
        assert await ask(pins, library, blend) == ([first, second], 0)

    newer = registry.publish("a", 1, by=registry.other)
    assert await ask(pins, library, "a") == ([newer], 2)
    registry.other.point("a", "latest", 1)
    assert await ask(pins, library, "a") == ([first], 2)
    assert await ask(pins, library, "a") == ([first], 0)
    registry.close()


@pytest.mark.anyio
async def test_deleted_adapter_is_unknown_at_once(registry: Registry) -> None:
    pins, library = RecentPins(registry.commits.now), registry.library
    digest = registry.publish("a", 0)
    await ask(pins, library, "a")
    pinned = await pins.pin(library, parse("a"), "adapter")
    registry.other.delete("a")
    with pytest.raises(NotFound, match="no such adapter"):
        await pins.pin(library, parse("a"), "adapter")
    registry.store.verify(digest)  # the pin keeps its bytes
    pinned.release()
    with pytest.raises(CorruptAdapter):
        registry.store.verify(digest)
    registry.close()


@pytest.mark.anyio
async def test_commit_between_look_up_and_pin(registry: Registry) -> None:
    """If another process deletes or publishes between look-up and pin, the new state counts."""
    numbers = Numbers(registry.commits.now)
    pins, library = RecentPins(numbers), registry.library
    registry.publish("a", 0)
    await ask(pins, library, "a")
    numbers.before = [lambda: None, lambda: registry.publish("a", 1, by=registry.other)]
    found, num = await ask(pins, library, "a")
    assert (found, num) == ([registry.library.get("a").versions[-1].digest], 2)
    await ask(pins, library, "a")
    numbers.before = [lambda: None, lambda: registry.other.delete("a")]
    with pytest.raises(NotFound):
        await pins.pin(library, parse("a"), "adapter")
    assert registry.store.digests() == []
    # The bytes of the version pinned on the event loop were then removed in another thread.
    assert [thread == threading.get_ident() for thread in CountingCatalog.asked_in] == [True, False]
    registry.close()


class Numbers:
    """Counts commits like `commits`, and runs the next function of `before` each time."""

    def __init__(self, commits: Callable[[], int | None]) -> None:
        self.before: list[Callable[[], object]] = []
        self._commits = commits

    def __call__(self) -> int | None:
        if self.before:
            self.before.pop(0)()
        return self._commits()


@pytest.mark.anyio
async def test_projects_do_not_share_resolutions(registry: Registry) -> None:
    pins, library = RecentPins(registry.commits.now), registry.library
    registry.publish("a", 0)
    await ask(pins, library, "a")
    with pytest.raises(NotFound):
        await pins.pin(library.of(Viewpoint("acme")), parse("a"), "adapter")
    registry.close()


@pytest.mark.anyio
async def test_resolutions_are_not_cached_while_commits_are_unknown(registry: Registry) -> None:
    """Names are still resolved."""
    said: Iterator[int | None] = iter([None, None, 1, 1, None, 1, 1, 1, None, None])
    pins, library = RecentPins(lambda: next(said)), registry.library
    digest = registry.publish("a", 0)
    assert await ask(pins, library, "a") == ([digest], 2)
    assert await ask(pins, library, "a") == ([digest], 2)
    assert await ask(pins, library, "a") == ([digest], 2)  # commits are known afterwards
    assert await ask(pins, library, "a") == ([digest], 2)  # commits are unknown afterwards
    assert await ask(pins, library, "a") == ([digest], 0)
    assert await ask(pins, library, "a") == ([digest], 2)  # commits are unknown once it is pinned
    registry.close()


@pytest.mark.anyio
async def test_known_names_are_used_for_a_while_without_the_database(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence, now = [0.0], [100.0]
    pins = RecentPins(lambda: None, Outage(lambda: silence[0], names=10.0), clock=lambda: now[0])
    library, digest = registry.library, registry.publish("a", 0)
    registry.publish("b", 1)
    assert await ask(pins, library, "a") == ([digest], 2)
    await ask(pins, library, "b")
    registry.other.delete("b")
    with pytest.raises(NotFound):
        await ask(pins, library, "b")

    def fail(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(CountingCatalog, "resolve", fail)
        assert await ask(pins, library, "a") == ([digest], 0), "before the silence is noticed"
        with pytest.raises(Interrupted):
            await ask(pins, library, "b")  # its deletion is known
        with pytest.raises(Interrupted):
            await ask(pins, library, "a*2")
        now[0] += 10
        assert await ask(pins, library, "a") == ([digest], 0)
        now[0] += 0.1
        with pytest.raises(Interrupted):
            await ask(pins, library, "a")
    assert await ask(pins, library, "a") == ([digest], 2)
    silence[0] = 4.0
    assert await ask(pins, library, "a") == ([digest], 0), "a silent database isn't asked"
    registry.close()


def test_commits_are_unknown_without_a_log_while_another_commits(registry: Registry) -> None:
    for engine in registry.engines:
        engine.dispose()
    other = driver.connect(registry.home / FILE_NAME, isolation_level=None)
    assert other.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    before = registry.commits()
    assert registry.commits.now() == before
    other.execute("BEGIN EXCLUSIVE")
    assert registry.commits.now() is None
    assert registry.commits() == before
    other.execute("ROLLBACK")
    assert registry.commits.now() == before
    other.close()
    registry.close()
