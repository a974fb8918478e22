"""A disk that fails during writes: a request that was answered with an error has no effect.

One call of Python or SQLite fails, then the disk works again. All acknowledged objects, and only these, are listed
by the server, which keeps running, and by a server started on the files as they are then, as after a kill. They
are complete and pass `doctor`. The refused request then succeeds. If all later calls fail too, nothing can be
rolled back: then the files are as after a kill at that line until the request succeeds.

`make test` lets each kind of call fail once per route. `make slow` adds a rollback journal for some routes, and
each single call with EIO.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.library import Library
from adapters.names import Viewpoint
from adapters.store.store import AdapterStore
from server.access.keys import Keys
from server.access.projects import Projects
from server.database import connect
from server.jobs.jobs import Jobs
from server.model.base.weights import BaseModel
from server.operations.doctor import examine
from server.storage.home import Home
from server.training.datasets import DatasetStore
from server.training.files import FileStore
from server.training.spec import JobSpec
from tests.end_to_end.server_process import PATIENCE, environment, free_port
from tests.stress.failing_disk.asks import ASKS, Ask, Asker
from tests.stress.failing_disk.disk import FailingDisk
from tests.stress.failing_disk.server import OPERATORS

SHM = Path("/dev/shm")
WAYS = ((errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.ENOSPC, True))
"""Error of the failing call, and whether all later calls fail too."""
PAGED = ("/adapters", "/train")
WORDS = ("the server's disk is full", "the server's disk fails to read or write")
_MADE_UP = re.compile(r"(?<=\.unfinished-)\S*|(?<=\.tmp-)\w+|(?<=upload-)\w+|[0-9a-f]{16,}|\b[0-9a-f]{2}\b|\d+")


class Server:
    """A server without workers, in a process whose disk can be made to fail."""

    def __init__(self, home: Path, model: Path, journal: str) -> None:
        self.home = home
        self.journal = journal
        self.disk = FailingDisk(home, home.with_name("control"))
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "tests.stress.failing_disk.server",
            str(home),
            str(model),
            journal,
            str(port),
        ]
        with home.with_name("log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment() | self.disk.environment, stdout=log, stderr=log
            )
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {OPERATORS}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)
        self._wait_until_ready(time.monotonic() + PATIENCE)

    def listed(self) -> dict[str, Any]:
        """Return everything that clients see, in brief."""

        def of(path: str) -> list[Any]:
            response = self.client.get(path, params={"limit": 1000} if path in PAGED else {})
            assert response.status_code == 200, response.text
            return list(response.json()[path.rpartition("/")[2] if path != "/train" else "jobs"])

        adapters = {a["name"]: (a["latest"], a["aliases"], a["visibility"]) for a in of("/adapters")}
        return {
            "adapters": adapters,
            "versions": [(a["name"], v["version"], v["digest"]) for a in of("/adapters") for v in a["versions"]],
            "jobs": {job["id"]: job["status"] for job in of("/train")},
            "keys": {key["id"]: key["revoked_at"] is not None for key in of("/keys")},
            "projects": {project["name"]: project["max_jobs"] for project in of("/projects")},
            "datasets": {dataset["id"] for dataset in of("/datasets")},
            "files": {file["id"] for file in self.client.get("/v1/files").json()["data"]},
        }

    def kill(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError("the server was not ready in time")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """Yield a folder in memory if possible: thousands of files are written and deleted."""
    with tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None) as place:
        yield Path(place)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, converted_tiny: Path, memory: Path) -> Iterator[Server]:
    server = Server(Path(tempfile.mkdtemp(dir=memory)) / "home", converted_tiny, request.param)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def asker(server: Server, tiny_base: BaseModel) -> Asker:
    return Asker(server.client, tiny_base.config.shape)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    """Yield numbers for requests, each once."""
    return iter(range(10, 10_000))


@pytest.fixture
def copies(memory: Path, tiny_base: BaseModel) -> "Copies":
    return Copies(memory / "copy", tiny_base)


class Copies:
    """The data that a server finds on a copy of HOME, taken at one moment."""

    def __init__(self, place: Path, base: BaseModel) -> None:
        self._place = place
        self._base = base

    def stored(self, home: Path) -> dict[str, Any]:
        """Return everything it lists. Raise AssertionError if anything is lost or `doctor` has findings."""
        shutil.rmtree(self._place, ignore_errors=True)
        # Without SQLite's shared memory, which a reboot loses.
        shutil.copytree(home, self._place, ignore=shutil.ignore_patterns("models", "native", "tmp", "*-shm"))
        place, engine = Home(self._place), connect(self._place)
        catalog = Catalog(engine, Records(place.adapters), Viewpoint(sees_all=True))
        jobs, base = Jobs(engine), self._base
        library = Library(
            catalog, AdapterStore(place.adapters), base.config.shape, base.name, jobs.in_use, base.digest
        )
        assert library.recover(jobs.is_known).lines() == ()
        adapters, all_jobs = catalog.list(), jobs.list(limit=1000)
        found = {
            "adapters": {
                a.name: (a.latest, dict(a.aliases), "public" if a.is_public else "private") for a in adapters
            },
            "versions": [(a.name, v.version, v.digest) for a in adapters for v in a.versions],
            "jobs": {job.id: str(job.status) for job in all_jobs},
            "keys": {key.id: key.revoked_at is not None for key in Keys(engine, place.keyed).list()},
            "projects": {project.name: project.quota.max_jobs for project in Projects(engine).list()},
            "datasets": {dataset.id for dataset in DatasetStore(place.datasets("default")).list()},
            "files": {file.id for file in FileStore(place.files("default")).list()},
        }
        engine.dispose()
        assert all((place.jobs / job.id).is_dir() for job in all_jobs if isinstance(job.spec, JobSpec))
        assert examine(self._place).findings == ()
        return found


def kinds(calls: Sequence[str]) -> list[int]:
    """Return the number of the first call of each kind, and of the last call."""
    first: dict[str, int] = {}
    for number, call in enumerate(calls):
        first.setdefault(_MADE_UP.sub("", call), number)
    return sorted({*first.values(), len(calls) - 1})


def check(
    server: Server, asker: Asker, ask: Ask, copies: Copies, at: int, way: tuple[int, bool], *, starts: bool = True
) -> None:
    """Let the call of that number fail while `ask` is answered. `starts`: also start a server on the files."""
    error, stays = way
    before = server.listed()
    with server.disk.failing(at, error, stays=stays):
        response = asker.send(ask)
    failed = f"{server.disk.calls()[at]}: {response.status_code} {response.text}" if server.disk.num_failed else ""
    if not response.is_success:  # otherwise the failed call didn't matter
        assert failed, response.text
        assert response.status_code == 503, failed
        assert any(words in response.text for words in WORDS), failed
        assert int(response.headers["retry-after"]) >= 1
        if not stays:
            assert server.listed() == before, failed
            assert not starts or copies.stored(server.home) == before, failed
        asker.done(ask)
    if starts and (stays or response.is_success):
        after = server.listed()
        assert after != before, failed
        assert copies.stored(server.home) == after, failed


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("server", ["wal"], indirect=True)
def test_each_kind_of_call_may_fail(
    server: Server, asker: Asker, copies: Copies, name: str, numbers: Iterator[int]
) -> None:
    calls = calls_of(server, asker, name, next(numbers))
    for number, at in enumerate(kinds(calls)):
        is_kept = re.match(r"rename|sync|.* smolora\.db", calls[at]) is not None
        ask = ASKS[name](asker, next(numbers))
        check(server, asker, ask, copies, at, WAYS[number % 4], starts=is_kept)
    assert copies.stored(server.home) == server.listed()


@pytest.mark.thorough  # the default, a write-ahead log, is tested above
@pytest.mark.parametrize("name", ["upload", "train", "alias", "key"])
@pytest.mark.parametrize("server", ["delete"], indirect=True)
def test_a_rollback_journal_may_fail(
    server: Server, asker: Asker, copies: Copies, name: str, numbers: Iterator[int]
) -> None:
    calls = calls_of(server, asker, name, next(numbers))
    for number, at in enumerate(at for at in kinds(calls) if "smolora.db" in calls[at]):
        check(server, asker, ASKS[name](asker, next(numbers)), copies, at, WAYS[number % 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("server", ["wal", "delete"], indirect=True)
def test_each_call_may_fail(
    server: Server, asker: Asker, copies: Copies, name: str, numbers: Iterator[int]
) -> None:
    for at in range(len(calls_of(server, asker, name, next(numbers)))):
        check(server, asker, ASKS[name](asker, next(numbers)), copies, at, WAYS[0])


def calls_of(server: Server, asker: Asker, name: str, number: int) -> list[str]:
    """Return the calls made if none fails."""
    ask = ASKS[name](asker, number)
    with server.disk.watched():
        asker.done(ask)
    return server.disk.calls()
