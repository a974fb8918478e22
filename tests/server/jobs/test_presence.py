"""Live workers are seen, from any process; dead ones aren't, however they died."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.sql import transact
from server.database import WORKER_PATIENCE_SECONDS, connect
from server.database.clock import database_time
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.jobs.presence import KEEP_SECONDS, announced, present_names, present_workers, workers
from server.jobs.supervisor import own_name, present, workers_of
from tests.kits.postgres import CLUSTER, Postgres
from tests.server.jobs.job_kit import submit, until

HOLD = """
import sys
from pathlib import Path
from server.jobs.supervisor import own_name, present
with present(Path(sys.argv[1])):
    print(own_name(), flush=True)
    sys.stdin.read()
"""


def test_no_worker_before_the_first(tmp_path: Path) -> None:
    assert workers_of(tmp_path) == []


def test_worker_is_present_while_it_lives(tmp_path: Path) -> None:
    with present(tmp_path):
        assert workers_of(tmp_path) == [own_name()]
        assert workers_of(tmp_path) == [own_name()], "looking changes nothing"
    assert workers_of(tmp_path) == []
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_killed_one_is_gone_at_once(tmp_path: Path) -> None:
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        names = []
        for other in others:
            assert other.stdout is not None
            names.append(other.stdout.readline().strip())
        assert workers_of(tmp_path) == sorted(names)
        others[0].kill()
        others[0].wait()
        until(lambda: workers_of(tmp_path) == [names[1]])
    finally:
        for other in others:
            other.kill()
            other.communicate()


def may_number_apart() -> bool:
    """Return whether this machine allows PID namespaces."""
    program = shutil.which("unshare")
    return (
        program is not None
        and subprocess.run([program, "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_number_apart(), reason="needs unshare, and leave to use it")
def test_two_containers_with_the_machines_name(tmp_path: Path) -> None:
    """As with Docker's `network_mode: host`: each is the first process of its own PID namespace."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", HOLD, str(tmp_path)]
    others = [subprocess.Popen(apart, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    watch = threading.Timer(100, others[1].kill)
    watch.start()
    try:
        names = {other.stdout.readline().strip() for other in others if other.stdout is not None}
        assert len(names - {""}) == 2, "the second one waits for the first"
        assert workers_of(tmp_path) == sorted(names)
    finally:
        watch.cancel()
        for other in others:
            other.kill()
            other.communicate()


def test_starting_worker_is_not_taken_for_dead(tmp_path: Path) -> None:
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            workers_of(tmp_path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with present(tmp_path):
                assert workers_of(tmp_path) == [own_name()]
    finally:
        ended.set()
        watcher.join()


def test_another_of_the_same_name_is_not_waited_for(tmp_path: Path) -> None:
    """Another container with this host name (`network_mode: host`) also numbers processes from 1."""
    has_begun = threading.Event()

    def work() -> None:
        with present(tmp_path):
            has_begun.set()

    with present(tmp_path):
        threading.Thread(target=work, daemon=True).start()
        assert has_begun.wait(60), "its worker takes no job for as long as this one lives"
        assert workers_of(tmp_path) == [own_name()]


def test_a_home_that_takes_no_file_stops_no_worker(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("in the way")
    with present(tmp_path):
        assert workers_of(tmp_path) == []


@pytest.fixture
def shared(postgres: Postgres, tmp_path: Path) -> Iterator[sa.Engine]:
    """A PostgreSQL database."""
    url = postgres.migrated()
    engine = connect(tmp_path, url=url)
    yield engine
    engine.dispose()
    postgres.drop(url)


def on_postgresql(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CLUSTER:
        test = mark(test)
    return test


@on_postgresql
def test_a_worker_has_a_row_while_it_lives(shared: sa.Engine, tmp_path: Path) -> None:
    with announced(shared, beat_seconds=0.05):
        until(lambda: present_names(shared) == {own_name()})
        (worker,) = present_workers(shared, tmp_path)
        assert (worker.name, worker.pid, worker.job_ids) == (own_name(), os.getpid(), ())
        assert worker.host == socket.gethostname()
        submit(Jobs(shared), "job-1")
        assert Leases(shared).claim(own_name()) is not None
        assert [worker.job_ids for worker in present_workers(shared, tmp_path)] == [("job-1",)]
    assert present_names(shared) == set()
    with shared.connect() as connection:
        assert connection.execute(sa.select(workers)).all() == []


@on_postgresql
def test_the_row_of_a_killed_worker_expires_and_is_deleted_by_another(shared: sa.Engine, tmp_path: Path) -> None:
    old = {"name": "gone:7", "host": "gone", "pid": 7, "since": datetime.now(UTC)}
    seen_at = database_time() - KEEP_SECONDS - 1

    def insert(connection: sa.Connection) -> None:
        connection.execute(sa.insert(workers).values(**old, seen_at=seen_at))

    transact(shared, insert)
    assert present_workers(shared, tmp_path) == []

    def rows() -> set[str]:
        with shared.connect() as connection:
            return set(connection.execute(sa.select(workers.c.name)).scalars())

    assert rows() == {"gone:7"}
    with announced(shared, beat_seconds=0.05):
        until(lambda: rows() == {own_name()})


@on_postgresql
def test_a_row_is_renewed_while_the_writers_lock_is_held(shared: sa.Engine) -> None:
    with shared.begin() as connection:  # takes the lock
        connection.execute(sa.select(workers)).all()
        with announced(shared, beat_seconds=0.05):
            until(lambda: present_names(shared) == {own_name()})


@on_postgresql
def test_a_worker_stops_although_the_database_is_gone(own_postgres: Postgres, tmp_path: Path) -> None:
    engine = connect(tmp_path, url=own_postgres.migrated(), patience=WORKER_PATIENCE_SECONDS)
    with announced(engine, beat_seconds=0.05):
        until(lambda: present_names(engine) == {own_name()})
        own_postgres.kill()
        began = time.monotonic()
    assert time.monotonic() - began < WORKER_PATIENCE_SECONDS
    engine.dispose()


def test_workers_on_a_database_file_are_those_of_its_home(tmp_path: Path) -> None:
    engine = connect(tmp_path)
    assert present_workers(engine, tmp_path) == []
    before = datetime.now(UTC) - timedelta(seconds=2)  # coarse clocks of file systems
    with present(tmp_path), announced(engine, beat_seconds=0.05):
        submit(Jobs(engine), "job-1")
        assert Leases(engine).claim(own_name()) is not None
        (worker,) = present_workers(engine, tmp_path)
        assert (worker.name, worker.pid, worker.job_ids) == (own_name(), os.getpid(), ("job-1",))
        assert before <= worker.since <= datetime.now(UTC)
        assert present_names(engine) == set()
        assert worker.line().endswith(": runs job-1")
    assert present_workers(engine, tmp_path) == []
    engine.dispose()
