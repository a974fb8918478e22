"""The database file: its settings, atomic migrations, and clear errors."""

import fcntl
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from adapters.catalog import catalog
from adapters.catalog import tables as adapter_tables
from adapters.names import Viewpoint
from server.access import tables as access_tables
from server.access.audit import Audit
from server.access.keys import Keys
from server.access.usage import Ledger
from server.cluster import deployed
from server.database import (
    FILE_NAME,
    build_of,
    connect,
    faults,
    migrating,
    nobody_has_it_open,
    opening,
    schema_of,
    set_aside,
)
from server.database.file import USERS_NAME, JournalMode, driver, has_wal_reset_bug
from server.database.migrating import newest_schema
from server.errors import StartupError
from server.jobs import presence
from server.jobs import tables as job_tables
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from tests.kits.migrations import LATER, upgrade_smolora

JOURNALS = pytest.mark.parametrize("journal", ["wal", "delete"])


@pytest.fixture
def journal() -> JournalMode | None:
    return None


@pytest.fixture
def engine(tmp_path: Path, journal: JournalMode | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path / "new" / "home", journal)
    yield engine
    engine.dispose()


def insert_adapter(next_version: int, latest: int | str = "NULL") -> str:
    values = f"'a', 'adapter', {latest}, {next_version}"
    return f"INSERT INTO adapters (name, kind, latest, next_version) VALUES ({values})"


def pragma(engine: sa.Engine, name: str) -> object:
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_commits_are_durable_and_keys_are_checked(engine: sa.Engine) -> None:
    settings = {name: pragma(engine, name) for name in ("synchronous", "foreign_keys", "busy_timeout")}
    assert settings == {"synchronous": 2, "foreign_keys": 1, "busy_timeout": 15_000}


def test_no_release_with_the_bug_keeps_a_write_ahead_log(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    major, minor, patch = map(int, version.split("."))
    expected = "delete" if has_wal_reset_bug((major, minor, patch)) else "wal"
    assert pragma(engine, "journal_mode") == expected
    build = build_of(engine)
    assert (build.version, build.journal_mode, build.is_sound) == (version, expected, True)


def test_an_existing_database_changes_its_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In both directions, and with the log of a killed process."""
    code = f"""
import os
from pathlib import Path
from server.database import connect
with connect(Path({str(tmp_path)!r}), "wal").begin() as connection:
    connection.exec_driver_sql("{insert_adapter(7)}")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size > 0
    unsound = []
    for mode in ("delete", "wal", "delete"):
        engine = connect(tmp_path, mode)
        build = build_of(engine)
        assert build.journal_mode == mode
        unsound += [] if build.is_sound else [str(build)]
        assert (tmp_path / f"{FILE_NAME}-wal").exists() == (mode == "wal")
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE adapters SET next_version = next_version + 1")
        engine.dispose()
    assert faults(tmp_path) == []
    with closing(driver.connect(tmp_path / FILE_NAME)) as file:
        assert file.execute("SELECT name, next_version FROM adapters").fetchall() == [("a", 10)]
    assert caplog.messages == unsound


@pytest.mark.parametrize(("first", "second"), [("delete", "wal"), ("wal", "delete")])
def test_later_connections_keep_the_journal_mode(tmp_path: Path, first: JournalMode, second: JournalMode) -> None:
    engines = [connect(tmp_path, first), connect(tmp_path, second)]
    assert [build_of(engine).journal_mode for engine in engines] == [first, first]
    for engine in engines:
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE adapters SET next_version = 2")
        engine.dispose()


def test_other_processes_with_the_file_open_do_not_block_the_start(tmp_path: Path) -> None:
    connect(tmp_path, "wal").dispose()
    with closing(driver.connect(tmp_path / FILE_NAME)) as stranger:
        stranger.execute("SELECT * FROM adapters").fetchall()
        engine = connect(tmp_path, "delete")
        assert build_of(engine).journal_mode == "wal"
        engine.dispose()
    engine = connect(tmp_path, "delete")
    assert build_of(engine).journal_mode == "delete"
    engine.dispose()


COUNTER = """
import sys
from pathlib import Path
from server.database import connect
engine = connect(Path(sys.argv[1]))
reader = engine.execution_options(isolation_level="AUTOCOMMIT")
print("ready", flush=True)
sys.stdin.readline()
seen = 0
for _ in range(40):
    with engine.begin() as connection:
        count = connection.exec_driver_sql("SELECT next_version FROM adapters").scalar_one()
        connection.exec_driver_sql(f"UPDATE adapters SET next_version = {count + 1}")
    with reader.connect() as connection:
        read = connection.exec_driver_sql("SELECT next_version FROM adapters").scalar_one()
    assert read > count >= seen, (read, count, seen)
    seen = read
engine.dispose()
"""


@JOURNALS
def test_processes_count_together(engine: sa.Engine, tmp_path: Path) -> None:
    """Every transaction counts, none fails for lack of the lock, and reads never go backwards."""
    with engine.begin() as connection:
        connection.exec_driver_sql(insert_adapter(0))
    command = [sys.executable, "-c", COUNTER, str(tmp_path / "new" / "home")]
    counters = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for counter in counters:
        assert counter.stdout is not None
        assert counter.stdout.readline() == "ready\n"
    for counter in counters:
        print(file=counter.stdin, flush=True)
    for counter in counters:
        counter.communicate(timeout=60)
        assert counter.returncode == 0
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT next_version FROM adapters").scalar_one() == 120


def test_the_migrations_make_what_the_code_expects(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        tables = (catalog, job_tables, access_tables, opening, migrating, deployed, presence)
        expected = [module.metadata for module in tables]
        assert compare_metadata(context, expected) == []  # type: ignore[arg-type]  # it takes several, too


def test_reopening_keeps_the_contents(engine: sa.Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(insert_adapter(7))
    again = connect(tmp_path / "new" / "home")
    with again.connect() as connection:
        assert connection.exec_driver_sql("SELECT name, next_version FROM adapters").all() == [("a", 7)]
    again.dispose()


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The last table exists already: the first two, created before it, must not stay."""
    file = driver.connect(tmp_path / FILE_NAME)
    file.execute("CREATE TABLE adapter_aliases (x)")
    file.commit()
    with pytest.raises(StartupError, match="already exists"):
        connect(tmp_path)
    tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"adapter_aliases"}
    file.execute("DROP TABLE adapter_aliases")
    file.commit()
    file.close()
    connect(tmp_path).dispose()


def test_many_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def open_it(_: int) -> int:
        barrier.wait()
        engine = connect(tmp_path)
        with engine.connect() as connection:
            count = connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar_one()
        engine.dispose()
        return int(count)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(open_it, range(8))) == [1] * 8


OPENER = """
import sys
from pathlib import Path
from server.database import connect
print("ready", flush=True)
for line in sys.stdin:
    connect(Path(line.strip())).dispose()
    print("open", flush=True)
"""


def test_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for attempt in range(10):
        for opener in openers:
            print(tmp_path / str(attempt), file=opener.stdin, flush=True)
        for opener in openers:
            assert opener.stdout is not None
            assert opener.stdout.readline() == "open\n"
    for opener in openers:
        opener.communicate()
        assert opener.returncode == 0


@JOURNALS
def test_a_writer_waits_for_another_and_readers_for_none(engine: sa.Engine) -> None:
    order: list[str] = []
    begins = threading.Event()

    def write() -> None:
        begins.set()
        with engine.begin() as connection:
            order.append("second")
            connection.exec_driver_sql("UPDATE adapters SET next_version = 3")

    def read() -> object:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            return connection.exec_driver_sql("SELECT next_version FROM adapters").scalar()

    with engine.begin() as connection:
        connection.exec_driver_sql(insert_adapter(1))
    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE adapters SET next_version = 2")
            waiting = pool.submit(write)
            assert begins.wait(30)
            assert [read() for _ in range(100)] == [1] * 100
            order.append("first")
        waiting.result()
    assert order == ["first", "second"]
    assert read() == 3


def test_a_current_database_is_opened_without_alembic(engine: sa.Engine, tmp_path: Path) -> None:
    """Importing Alembic takes longer than opening the database."""
    home = tmp_path / "new" / "home"
    assert schema_of(home / FILE_NAME) == newest_schema() == "0005"
    code = (
        "import sys; from pathlib import Path; from server.database import connect;"
        "connect(Path(sys.argv[1])); print('alembic' in sys.modules)"
    )
    opening = [sys.executable, "-c", code, str(home)]
    assert subprocess.run(opening, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_database_of_an_unknown_schema_is_refused(engine: sa.Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("UPDATE schema_range SET lowest = '9000'")
    message = r"smolora.db: the database has schema 9999, .*use the version .* or give an empty SMOLORA_HOME"
    with pytest.raises(StartupError, match=message):
        connect(tmp_path / "new" / "home")


def test_this_version_uses_a_later_schema_that_only_expands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade is undone, the previous version starts again with the same database."""
    with monkeypatch.context() as later:
        upgrade_smolora(later, tmp_path)
        connect(tmp_path).dispose()
    assert schema_of(tmp_path / FILE_NAME) == LATER
    engine = connect(tmp_path)
    with engine.begin() as connection:
        connection.exec_driver_sql(insert_adapter(7))
    with pytest.raises(StartupError, match=rf"schema {LATER}, which is newer than smolora"):
        migrating.refuse_newer(engine)
    engine.dispose()
    with monkeypatch.context() as later:
        upgrade_smolora(later, tmp_path / "again")
        connect(tmp_path).dispose()


def test_this_version_refuses_a_later_schema_that_contracts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        upgrade_smolora(later, tmp_path, lowest=LATER)
        connect(tmp_path).dispose()
    with pytest.raises(StartupError, match=f"the database has schema {LATER}, which smolora .* doesn't know"):
        connect(tmp_path)


def make_version_1(home: Path) -> None:
    """Write the database of a HOME of the first release: two adapters, a composition, two jobs, a key."""
    with closing(sqlite3.connect(home / FILE_NAME)) as connection:
        connection.executescript((Path(__file__).parent / "version_1.sql").read_text(encoding="utf-8"))


def test_a_database_of_version_1_opens(tmp_path: Path) -> None:
    make_version_1(tmp_path)
    engine = connect(tmp_path)
    assert schema_of(tmp_path / FILE_NAME) == newest_schema()
    mix, poems, tweets = catalog.Catalog(engine).list()
    assert (tweets.latest, tweets.aliases, tweets.versions[0].metrics) == (1, {"prod": 1}, {"loss": 0.5})
    assert [(part.name, part.weight) for part in mix.versions[0].parts] == [("tweets", 0.5), ("poems", 0.5)]
    assert poems.versions[0].digest == f"{2:064x}"
    queued, failed = Jobs(engine).list()
    assert (failed.id, failed.status, failed.error) == ("job-1", "failed", "no rows")
    assert [event.message for event in Jobs(engine).events("job-1")] == ["queued", "started", "no rows"]
    claim = Leases(engine).claim("w")
    assert claim is not None
    assert claim.job_id == queued.id == "job-2"
    (key,) = Keys(engine, tmp_path / "keyed").list()
    assert (key.name, key.project, key.scopes) == ("laptop", "default", ("generate", "train"))
    assert [row["requests"] for row in Ledger(engine).rows(None, None, ["adapter"])] == [1, 0]
    engine.dispose()


@pytest.mark.parametrize("is_deleted", [True, False])
def test_history_of_projects_deleted_in_version_1_is_retired(tmp_path: Path, is_deleted: bool) -> None:
    """Else it would belong to a new project of the same name. Jobs' bytes aren't known yet."""
    make_version_1(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        for table in ("jobs", "api_keys", "usage", "audit"):
            connection.execute(f"UPDATE {table} SET project = 'acme'")
        connection.execute("UPDATE jobs SET idempotency_key = 'acme/' || id")
        connection.execute("INSERT INTO adapters VALUES ('acme/empty', 'acme', 0, 'adapter', NULL, 0, 3)")
        if not is_deleted:
            connection.execute("INSERT INTO projects (name, created_at) VALUES ('acme', '2026-11-30 20:06:45')")
        connection.commit()
    engine = connect(tmp_path)
    kept = "acme~old" if is_deleted else "acme"
    assert {job.project for job in Jobs(engine).list()} == {kept}
    assert len(Jobs(engine).of(Viewpoint("acme")).list()) == (0 if is_deleted else 2)
    assert {key.project for key in Keys(engine, tmp_path / "keyed").list()} == {kept}
    assert {entry.project for entry in Audit(engine).list(9)} == {kept}
    assert bool(Ledger(engine).rows(None, None, ["project"], "acme")) is not is_deleted
    assert len(Jobs(engine).uncounted()) == 2
    once, adapters = job_tables.jobs.c.idempotency_key, adapter_tables.names.c
    with engine.connect() as database:
        found = set(database.execute(sa.select(once)).scalars())
        numbers = database.execute(sa.select(adapters.next_version).where(adapters.project == "acme")).scalars()
        assert found == ({None} if is_deleted else {"acme/job-1", "acme/job-2"})
        assert list(numbers) == ([] if is_deleted else [3])
    engine.dispose()


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"something else" * 1000)
    with pytest.raises(StartupError, match=r"can't open the database .*: file is not a database"):
        connect(tmp_path)


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StartupError, match="can't write there"):
        connect(tmp_path / "home")
    with pytest.raises(StartupError, match="can't write there"):
        connect(tmp_path / "home" / "below")


def test_an_older_schema_in_use_is_not_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older worker that has it open would continue to write to the old schema."""
    path = tmp_path / FILE_NAME
    make_version_1(tmp_path)
    upgrade_smolora(monkeypatch, tmp_path)
    with open(tmp_path / USERS_NAME, "wb") as users:
        fcntl.flock(users, fcntl.LOCK_SH)  # as older versions do
        message = (
            r"an older schema, and a server, worker, command or backup .* has it open: stop all of them first"
        )
        with pytest.raises(StartupError, match=message):
            connect(tmp_path)
        assert schema_of(path) == "0001"
    connect(tmp_path).dispose()
    assert schema_of(path) == newest_schema() == LATER


def test_an_older_process_gets_time_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator may stop a server and start the new version at once."""
    make_version_1(tmp_path)
    upgrade_smolora(monkeypatch, tmp_path)
    with open(tmp_path / USERS_NAME, "wb") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        leaving = threading.Timer(0.5, fcntl.flock, (users, fcntl.LOCK_UN))
        leaving.start()
        connect(tmp_path, journal_mode="wal").dispose()
        leaving.join()
    assert schema_of(tmp_path / FILE_NAME) == LATER
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",), "it was alone in the end"


def test_a_database_in_use_is_known_to_be(tmp_path: Path) -> None:
    with nobody_has_it_open(tmp_path):
        pass
    first, second = connect(tmp_path), connect(tmp_path)
    first.dispose()
    with pytest.raises(StartupError, match="stop it first"), nobody_has_it_open(tmp_path):
        pass
    second.dispose()
    with nobody_has_it_open(tmp_path):
        pass


def test_faults_of_the_file(tmp_path: Path) -> None:
    assert faults(tmp_path) == ["is missing"]
    assert list(tmp_path.iterdir()) == []
    connect(tmp_path).dispose()
    assert faults(tmp_path) == []
    with closing(driver.connect(tmp_path / FILE_NAME)) as file:
        file.execute("INSERT INTO adapter_aliases VALUES ('nobody', 'prod', 1)")
        file.commit()
    (fault,) = faults(tmp_path)
    assert "adapter_aliases" in fault
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[4096:12288] = b"\xff" * 8192
    (tmp_path / FILE_NAME).write_bytes(content)
    assert faults(tmp_path) != []
    assert set_aside(tmp_path) == [f"{FILE_NAME}.damaged-1"]
    connect(tmp_path).dispose()
    (tmp_path / FILE_NAME).write_bytes(b"junk" * 100)
    assert set_aside(tmp_path) == [f"{FILE_NAME}.damaged-2"]
