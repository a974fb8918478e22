"""Removing a deleted adapter's bytes may wait for the disk or the database, but never blocks the event loop."""

import asyncio
import fcntl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from adapters.errors import CorruptAdapter
from adapters.library import Library
from adapters.store.store import AdapterStore
from server.jobs.jobs import Jobs
from tests.server.api.fakes import FakeEngine, until
from tests.server.api.generate.test_generate import upload
from tests.server.conftest import library_in

pytestmark = pytest.mark.anyio

TOO_LONG = 15.0
"""Seconds after which a wait ends by itself, because a blocked event loop couldn't end it."""


class SlowDatabase:
    """Blocks the question whether bytes may go, until `answer`."""

    def __init__(self) -> None:
        self.is_slow = False
        self.fault: OSError | None = None
        self.threads: list[int] = []
        self.is_asked = False
        self._answers = threading.Event()

    def answer(self) -> None:
        self._answers.set()

    def __call__(self) -> None:
        self.threads.append(threading.get_ident())
        if self.fault is not None:
            raise self.fault
        if self.is_slow:
            self.is_asked = True
            self._answers.wait(TOO_LONG)
            self.is_asked = False


class BusyDisk:
    """A database that another process keeps locked until `end`."""

    def __init__(self, home: Path) -> None:
        self._file = (home / "adapters" / ".lock").open("ab")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.is_busy = True
        self._timer = threading.Timer(TOO_LONG, self.end)
        self._timer.start()

    def end(self) -> None:
        self._timer.cancel()
        self.is_busy = False
        self._file.close()


@pytest.fixture
def slow() -> Iterator[SlowDatabase]:
    slow = SlowDatabase()
    yield slow
    slow.answer()


@pytest.fixture
def library(database: sa.Engine, store: AdapterStore, jobs: Jobs, tmp_path: Path, slow: SlowDatabase) -> Library:
    library = library_in(tmp_path, database, store, jobs)

    def is_parent(digest: str, project: str | None = None) -> bool:
        if project is None:  # about bytes, not about a version
            slow()
        return jobs.in_use(digest, project)

    library._is_parent = is_parent
    return library


def body(name: str) -> dict[str, object]:
    return {"prompt": "a", "max_tokens": 4, "adapter": name}


async def check_others_run(client: httpx.AsyncClient, is_waiting: Callable[[], bool]) -> None:
    """Check that other requests run. Ask twice, because names are remembered from the first request."""
    async with asyncio.timeout(TOO_LONG):
        for _ in range(2):
            assert (await client.get("/health")).status_code == 200
            answer = (await client.post("/generate", json=body("other"))).json()
            assert answer["choices"][0]["text"] == "w0 w1 w2 w3 "
    assert is_waiting()


async def test_delete_that_waits_for_the_database(
    client: httpx.AsyncClient, store: AdapterStore, slow: SlowDatabase
) -> None:
    digest = await upload(client, "tweets", 1)
    await upload(client, "other", 2)
    slow.is_slow = True
    deleting = asyncio.create_task(client.delete("/adapters/tweets"))
    await until(lambda: slow.is_asked)
    await check_others_run(client, lambda: slow.is_asked)
    assert (await client.post("/generate", json=body("tweets"))).status_code == 404
    assert not deleting.done()
    slow.answer()
    assert (await deleting).status_code == 204
    with pytest.raises(CorruptAdapter):
        store.load(digest)


async def test_delete_that_waits_for_the_disk(
    client: httpx.AsyncClient, store: AdapterStore, tmp_path: Path
) -> None:
    digest = await upload(client, "tweets", 1)
    await upload(client, "other", 2)
    disk = BusyDisk(tmp_path)
    deleting = asyncio.create_task(client.delete("/adapters/tweets"))
    while (await client.get("/adapters/tweets")).status_code == 200:
        await asyncio.sleep(0.001)
    await check_others_run(client, lambda: disk.is_busy)
    assert not deleting.done()
    disk.end()
    assert (await deleting).status_code == 204
    with pytest.raises(CorruptAdapter):
        store.load(digest)


async def deleted_while_it_runs(client: httpx.AsyncClient, engine: FakeEngine) -> "asyncio.Task[httpx.Response]":
    """Start a request that waits for `engine.held`, and delete its adapter meanwhile."""
    engine.hold_after = 2
    running = asyncio.create_task(client.post("/generate", json=body("tweets")))
    await until(lambda: len(engine.open) == 1)
    assert (await client.delete("/adapters/tweets")).status_code == 204
    engine.hold_after = None
    return running


async def test_last_answer_removes_deleted_bytes_in_a_thread(
    client: httpx.AsyncClient, engine: FakeEngine, store: AdapterStore, slow: SlowDatabase, tmp_path: Path
) -> None:
    digest = await upload(client, "tweets", 1)
    await upload(client, "other", 2)
    running = await deleted_while_it_runs(client, engine)
    disk = BusyDisk(tmp_path)
    engine.held.set()
    await until(lambda: not engine.open)
    await check_others_run(client, lambda: disk.is_busy)
    assert store.load(digest).max_rank == 2
    slow.is_slow = True
    disk.end()
    await until(lambda: slow.is_asked)
    await check_others_run(client, lambda: slow.is_asked)
    slow.answer()
    assert (await running).status_code == 200
    with pytest.raises(CorruptAdapter):
        store.load(digest)
    assert threading.get_ident() not in slow.threads


async def test_answer_succeeds_if_deleted_bytes_cannot_be_removed(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: AdapterStore,
    library: Library,
    slow: SlowDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest = await upload(client, "tweets", 1)
    running = await deleted_while_it_runs(client, engine)
    slow.fault = OSError("the disk fails")
    engine.held.set()
    assert (await running).status_code == 200
    assert "can't remove the bytes of a deleted version" in caplog.text
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'smolora_requests_total{outcome="completed"} 1.0' in lines
    slow.fault = None
    assert store.digests() == [digest]
    library.sweep()
    assert store.digests() == []
