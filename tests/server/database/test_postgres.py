"""A real PostgreSQL: one writer at a time, known commits, and errors while it is unavailable."""

import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from adapters.catalog.catalog import Catalog, metadata
from adapters.catalog.versions import Part
from adapters.errors import Interrupted, InvalidInput, NotFound, Unavailable
from adapters.expression import Term
from adapters.sql import transact
from server.access import tables as access_tables
from server.access.access import open_access
from server.access.keys import Keys
from server.access.principal import EVERYBODY, OPERATOR
from server.access.usage import Ledger, Usage
from server.cluster import deployed
from server.database import WORKER_PATIENCE_SECONDS, commits_of, connect, described, migrating, opening
from server.database.opening import PATIENCE_SECONDS, without_writers_lock
from server.errors import StartupError
from server.jobs import presence
from server.jobs import tables as job_tables
from server.jobs.jobs import Jobs
from server.jobs.leases import LEASE_SECONDS, Leases
from server.storage.home import Home
from tests.kits.migrations import upgrade_smolora
from tests.kits.postgres import CLUSTER, Postgres
from tests.server.jobs.job_kit import submit

pytestmark = CLUSTER


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    url = postgres.migrated()
    yield url
    postgres.drop(url)


@pytest.fixture
def engine(url: str, tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, url=url)
    yield engine
    engine.dispose()


@pytest.fixture
def patient(url: str, tmp_path: Path) -> Iterator[sa.Engine]:
    """Like `engine`, but it waits as long for other writers as a worker does: a busy machine may need that."""
    engine = connect(tmp_path, url=url, patience=WORKER_PATIENCE_SECONDS)
    yield engine
    engine.dispose()


def publish(catalog: Catalog, name: str = "a") -> int:
    return catalog.publish(
        name, digest="0" * 64, rank=1, alpha=1, target_modules=[], parameters=1, bytes=1
    ).version


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_migrations_make_what_the_code_expects(engine: sa.Engine) -> None:
    from server.access.database_rates import windows

    assert described(engine).startswith("PostgreSQL 1")
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "include_name": lambda name, *_: name != "marks"}
        )
        tables = (job_tables, access_tables, opening, migrating, deployed, presence)
        known: Any = [metadata, windows.metadata, *(module.metadata for module in tables)]
        assert compare_metadata(context, known) == []


OPENER = """
import sys
from pathlib import Path
from server.database import connect
print("ready", flush=True)
sys.stdin.readline()
connect(Path(sys.argv[1]), url=sys.argv[2]).dispose()
"""


def test_processes_may_migrate_an_empty_database_at_once(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.url(postgres.new())
    command = [sys.executable, "-c", OPENER, str(tmp_path), url]
    openers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        opener.communicate("go\n", timeout=60)
    assert [opener.returncode for opener in openers] == [0] * 4
    postgres.drop(url)


def test_a_database_of_an_unknown_schema_is_refused(engine: sa.Engine, url: str, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("UPDATE schema_range SET lowest = '9000'")
    with pytest.raises(StartupError, match=r"schema 9999, .* or give an empty SMOLORA_DATABASE_URL"):
        connect(tmp_path, url=url)


def test_the_previous_version_starts_next_to_a_later_schema(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an upgrade, or after its rollback, other processes restart, such as jobs' and API processes."""
    with monkeypatch.context() as later:
        upgrade_smolora(later, tmp_path)
        connect(tmp_path, url=url).dispose()
    code = f"{OPENER}\nprint(connect(Path(sys.argv[1]), url=sys.argv[2]).dialect.name)"
    opening_it = [sys.executable, "-c", code, str(tmp_path), url]
    done = subprocess.run(opening_it, capture_output=True, text=True, input="\n", check=False)
    assert done.stdout.splitlines()[-1:] == ["postgresql"], done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "postgresql://me:hunter2@127.0.0.1:port/db",
        "postgresql://me:hunter2@[::1/db",
        "postgresql://me:hunter2@127.0.0.1:1/db?nonsense=1",
    ],
)
def test_no_error_quotes_the_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="SMOLORA_DATABASE_URL") as caught:
        connect(tmp_path, url=url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_writer_waits_for_another_and_readers_for_none(engine: sa.Engine) -> None:
    order: list[str] = []

    def write() -> None:
        with engine.begin() as connection:
            order.append("second")
            connection.exec_driver_sql("UPDATE access_changes SET number = 3")

    def read() -> object:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            return connection.exec_driver_sql("SELECT number FROM access_changes").scalar()

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE access_changes SET number = 2")
            waiting = pool.submit(write)
            assert [read() for _ in range(50)] == [0] * 50
            order.append("first")
        waiting.result()
    assert (order, read()) == (["first", "second"], 3)


WRITER = """
import sys
from pathlib import Path
from adapters.catalog.catalog import Catalog
from adapters.errors import Unavailable
from server.database import connect
catalog = Catalog(connect(Path(sys.argv[1]), url=sys.argv[2], patience=float(sys.argv[4])))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    try:
        new = catalog.publish("shared", digest="0" * 64, rank=1, alpha=1, target_modules=[], parameters=1, bytes=1)
        print(new.version, flush=True)
    except Unavailable:
        print("refused", flush=True)
"""


def writers(
    url: str, home: Path, num_times: int, patience: float = PATIENCE_SECONDS
) -> "list[subprocess.Popen[str]]":
    """Start eight processes that are about to publish under one name."""
    command = [sys.executable, "-c", WRITER, str(home), url, str(num_times), str(patience)]
    found = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for writer in found:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    return found


def test_eight_processes_publish_under_one_name(url: str, engine: sa.Engine, tmp_path: Path) -> None:
    lines: list[str] = []
    found = writers(url, tmp_path, 25, WORKER_PATIENCE_SECONDS)
    for writer in found:
        print("go", file=writer.stdin, flush=True)
    for writer in found:
        lines += writer.communicate(timeout=120)[0].split()
    assert sorted(map(int, lines)) == list(range(1, 201))
    assert len(Catalog(engine).get("shared").versions) == 200


def test_a_server_that_is_killed_loses_and_doubles_nothing(own_postgres: Postgres, tmp_path: Path) -> None:
    """SIGKILL while eight processes publish, twice: exactly the acknowledged numbers exist."""
    url = own_postgres.migrated()
    found = writers(url, tmp_path, 60)
    for writer in found:
        print("go", file=writer.stdin, flush=True)
    for end in (own_postgres.kill, own_postgres.stop):
        time.sleep(0.4)
        end()
        time.sleep(0.3)
        own_postgres.start()
    lines: list[str] = []
    for writer in found:
        lines += writer.communicate(timeout=120)[0].split()
        assert writer.returncode == 0
    numbers = sorted(int(line) for line in lines if line != "refused")
    engine = connect(tmp_path, url=url)
    stored = [version.version for version in Catalog(engine).get("shared").versions]
    engine.dispose()
    assert numbers == stored
    assert len(lines) == 8 * 60
    assert len(numbers) > 240


@pytest.mark.parametrize("is_locked", [True, False])
def test_outcome_of_an_unanswered_commit_is_determined(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    """The session ends after the commit was done, or before it was sent: the database itself tells which."""
    import psycopg

    commit = psycopg.Connection.commit
    ends: list[str] = []

    def cut_off(connection: "psycopg.Connection[Any]") -> None:
        if not ends:
            commit(connection)
            return
        if (when := ends.pop()) == "after":
            commit(connection)
        connection.close()
        raise psycopg.OperationalError(f"cut off {when}")

    monkeypatch.setattr(psycopg.Connection, "commit", cut_off)
    calls = 0

    def work(connection: sa.Connection) -> None:
        nonlocal calls
        calls += 1
        connection.exec_driver_sql("UPDATE access_changes SET number = number + 1")

    def count() -> object:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            return connection.exec_driver_sql("SELECT number FROM access_changes").scalar_one()

    for when, num_calls in (("after", 1), ("before", 2)):
        before, calls = count(), 0
        ends = [when]
        transact(engine if is_locked else without_writers_lock(engine), work)
        assert calls == num_calls
        assert count() == int(str(before)) + 1


@pytest.mark.parametrize("in_midst", [False, True])
def test_transaction_of_an_ended_session_is_retried(url: str, engine: sa.Engine, in_midst: bool) -> None:
    """An administrator ends the session before its transaction began or inside it, while the socket is still
    open."""
    import psycopg

    num_calls, to_end = 0, [True]

    def end(driven: "psycopg.Connection[Any]") -> None:
        if to_end:
            to_end.clear()
            with psycopg.connect(url) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", [driven.info.backend_pid])

    def work(connection: sa.Connection) -> None:
        nonlocal num_calls
        num_calls += 1
        connection.exec_driver_sql("UPDATE access_changes SET number = number + 1")
        if in_midst:
            end(cast("psycopg.Connection[Any]", connection.connection.dbapi_connection))
            connection.exec_driver_sql("UPDATE access_changes SET number = number + 1")

    if not in_midst:
        sa.event.listen(engine, "checkout", lambda driven, *_: end(driven))
    transact(engine, work)
    assert not to_end
    assert num_calls == 1 + in_midst
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT number FROM access_changes").scalar_one() == 1 + in_midst


def test_requests_during_an_outage_are_told_to_retry(own_postgres: Postgres, tmp_path: Path) -> None:
    url = own_postgres.migrated()
    engine = connect(tmp_path, url=url, patience=0.0)
    catalog, commits = Catalog(engine), commits_of(engine, tmp_path)
    assert publish(catalog) == 1
    own_postgres.kill()
    for call in (lambda: publish(catalog), lambda: catalog.resolve([Term("a")]), catalog.list):
        with pytest.raises(Unavailable) as caught:
            call()
        assert isinstance(caught.value, Interrupted)
    until(lambda: commits() < commits())  # it was noticed
    assert commits() < commits() < commits(), "nothing that is remembered is trusted"
    own_postgres.start()
    assert publish(catalog) == 2
    until(lambda: commits() == commits())
    engine.dispose()


def test_a_workers_reads_wait_no_longer_than_a_servers(own_postgres: Postgres, tmp_path: Path) -> None:
    """So workers stop in time while the database is unavailable; their writes are retried for longer."""
    engine = connect(tmp_path, url=own_postgres.migrated(), patience=WORKER_PATIENCE_SECONDS)
    jobs = Jobs(engine)
    own_postgres.kill()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        jobs.standings(["train-1"])
    assert PATIENCE_SECONDS < time.monotonic() - start < WORKER_PATIENCE_SECONDS / 2
    engine.dispose()


def test_requests_wait_for_a_restart(
    own_postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of a key, names and job events also wait, for up to `patience`."""
    monkeypatch.setattr(
        "server.database.postgres.PATIENCE_SECONDS", 60.0
    )  # others use the machine, for seconds at a time
    url = own_postgres.migrated()
    engine = connect(tmp_path, url=url, patience=60.0)
    catalog, jobs, commits = Catalog(engine), Jobs(engine), commits_of(engine, tmp_path)
    ring = open_access(engine, Home(tmp_path).keyed, commits).ring
    assert publish(catalog) == 1
    own_postgres.kill()
    until(lambda: commits() < commits())  # cached data isn't trusted
    reads: list[Callable[[], object]] = [
        lambda: anyio.run(ring.principal, None),
        lambda: catalog.resolve([Term("a")]),
        lambda: jobs.standings(["train-1"]),
    ]
    with ThreadPoolExecutor(len(reads)) as pool:
        asked = [pool.submit(read) for read in reads]
        time.sleep(0.5)
        own_postgres.start()
        principal, parts, standings = (one.result() for one in asked)
    assert principal == EVERYBODY
    assert len(cast("tuple[Part, ...]", parts)) == 1
    assert standings == {}
    engine.dispose()


def test_stalled_writer_blocks_others_only_briefly(engine: sa.Engine) -> None:
    """On a stopped machine, for example: its session ends, its writes are rolled back, and it must retry."""

    def stand_still() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '100ms'")
            connection.exec_driver_sql("UPDATE access_changes SET number = 77")
            time.sleep(0.4)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(publish, Catalog(engine)).result(timeout=60) == 1

    with pytest.raises(Interrupted):
        stand_still()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT number FROM access_changes").scalar_one() == 0


def test_usage_and_metrics_of_steps_do_not_wait_for_writers(engine: sa.Engine, tmp_path: Path) -> None:
    jobs, leases, ledger = Jobs(engine), Leases(engine), Ledger(engine)
    keys = Keys(engine, Home(tmp_path).keyed)
    key, _ = keys.create("one", who=OPERATOR)
    submit(jobs, "j1")
    claim = leases.claim("w")
    assert claim is not None
    with engine.begin():  # holds the writers' lock
        for number in range(3):
            ledger.add("default", key.id, f"a{number}", Usage(requests=1))
        ledger.flush()
        keys.used({key.id: datetime.now(UTC)})
        leases.add_metrics(claim, "step 1", {"step": 1})
    assert ledger.rows(None, None, ())[0]["requests"] == 3
    assert keys.get(key.id).last_used_at is not None
    assert jobs.events("j1")[-1].data == {"step": 1}


def test_servers_add_to_the_same_usage_at_once(patient: sa.Engine) -> None:
    """Each in an order of its own: nothing is lost or doubled, and none waits for another forever."""

    def add(seed: int) -> None:
        ledger, names = Ledger(patient), [f"a{number}" for number in range(50)]
        for turn in range(5):
            random.Random(seed + turn).shuffle(names)
            for name in names:
                ledger.add("default", "key", name, Usage(requests=1, prompt_tokens=seed))
            ledger.flush()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    rows = Ledger(patient).rows(None, None, ("adapter",))
    assert {(row["requests"], row["prompt_tokens"]) for row in rows} == {(20, 5 * (1 + 2 + 3))}
    assert len(rows) == 50


def test_a_lease_outlives_three_waits_for_a_lock() -> None:
    from server.database.postgres import LOCK_SECONDS

    assert LEASE_SECONDS >= 3 * LOCK_SECONDS


def test_commits_of_others_are_heard_at_once(url: str, engine: sa.Engine, tmp_path: Path) -> None:
    commits = commits_of(engine, tmp_path)
    until(lambda: commits() == commits())
    time.sleep(0.05)
    before = commits()
    publish(Catalog(engine))
    assert commits() == before + 1, "its own, as soon as it is done"
    time.sleep(0.2)
    assert commits() == before + 1, "which its notice doesn't count again"
    other = connect(tmp_path, url=url)
    until(lambda: commits() == commits())
    took, end = [1.0] * 20, time.monotonic() + 30
    while sorted(took)[10] >= 0.05 and time.monotonic() < end:
        took = []
        for _ in range(20):
            before = commits()
            publish(Catalog(other))
            start = time.perf_counter()
            until(lambda: commits() != before)  # noqa: B023 called here
            took.append(time.perf_counter() - start)
    other.dispose()
    assert sorted(took)[10] < 0.05
    whole, end = 1.0, time.monotonic() + 30
    while whole >= 0.05 and time.monotonic() < end:  # others use the machine, for seconds at a time
        start = time.perf_counter()
        for _ in range(1000):
            commits()
        whole = time.perf_counter() - start
    assert whole < 0.05, "microseconds each"


def test_text_that_cannot_be_stored_is_refused(engine: sa.Engine) -> None:
    catalog = Catalog(engine)
    for name in ("a\0b", "\ud800"):
        with pytest.raises((InvalidInput, NotFound), match="NUL"):
            catalog.resolve([Term(name)])


def test_a_pool_that_is_used_up_is_no_fault_of_ours(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    engine.pool._timeout = 0.1  # type: ignore[attr-defined]  # not the ten seconds
    held = [engine.connect() for _ in range(32)]
    with pytest.raises(Unavailable, match="busy"):
        engine.connect()
    for connection in held:
        connection.close()


def test_threads_share_an_engine(patient: sa.Engine) -> None:
    barrier = threading.Barrier(8)

    def work(_: int) -> list[int]:
        barrier.wait()
        return [publish(Catalog(patient), "shared") for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        numbers = sorted(number for found in pool.map(work, range(8)) for number in found)
    assert numbers == list(range(1, 81))


def test_connections_returned_after_the_end_are_closed(engine: sa.Engine) -> None:
    """A thread may still run, or start, while its server ends."""
    with engine.connect() as out:
        engine.dispose()
        driven = [out.connection.dbapi_connection]
    with engine.connect() as late:
        driven.append(late.connection.dbapi_connection)
    assert [connection.closed for connection in driven] == [True, True]  # type: ignore[union-attr]
