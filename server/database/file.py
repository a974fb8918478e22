"""The database as one SQLite file under HOME, which is migrated when it is opened.

Every committed write survives a power cut (synchronous=FULL), and a writer waits up to `BUSY_SECONDS` for another
writer. A transaction takes the write lock when it begins, so it can't fail halfway because another process wrote.
Single reads run without a transaction (isolation level AUTOCOMMIT): with a write-ahead log they wait for no
writer; with a rollback journal they wait while a writer commits.

SQLite 3.7.0 to 3.51.2 has a race in WAL mode, the "WAL-reset bug" (https://sqlite.org/wal.html#walresetbug): if
one connection checkpoints while another one commits, pages of a later commit may never reach the database, which
is then corrupt. So the standard library's build is used only if it has the fix. Otherwise pysqlite3's build is
used; if that is missing too, the database gets a rollback journal, which doesn't have the race.
"""

import fcntl
import importlib
import logging
import os
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from adapters.sql import reader_of
from server.database.migrating import migrate
from server.errors import StartupError
from server.storage.home import make

JournalMode = Literal["wal", "delete"]
"""SQLite's names of a write-ahead log and of a rollback journal, which each commit deletes."""

_KINDS = {"wal": "a write-ahead log", "delete": "a rollback journal"}


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Return whether this release of SQLite has the WAL-reset bug. Late releases of 3.44 and 3.50 have the fix."""
    has_fix = (3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51)
    return (3, 7) <= version < (3, 51, 3) and not has_fix


def choose_driver(standard: ModuleType, other: str) -> ModuleType:
    """Return the module named `other` if it has the fix for the WAL-reset bug and `standard` doesn't.

    Return `standard` otherwise, or if `other` isn't installed.
    """
    if not has_wal_reset_bug(standard.sqlite_version_info):
        return standard
    try:
        found = importlib.import_module(other)
    except ImportError:  # there is no wheel for this machine
        return standard
    return standard if has_wal_reset_bug(found.sqlite_version_info) else found


if TYPE_CHECKING:
    driver = sqlite3
else:
    driver = choose_driver(sqlite3, "pysqlite3.dbapi2")


def safe_journal_mode(version: tuple[int, int, int]) -> JournalMode:
    """Return the journal mode to use with this release of SQLite, so that the WAL-reset bug can't occur."""
    return "delete" if has_wal_reset_bug(version) else "wal"


@dataclass(frozen=True)
class Build:
    """The SQLite release that has opened a database, and the database's journal mode."""

    version: str
    journal_mode: str

    @property
    def is_sound(self) -> bool:
        """Return whether the journal mode is safe with this release."""
        major, minor, patch = map(int, self.version.split("."))
        return self.journal_mode != "wal" or not has_wal_reset_bug((major, minor, patch))

    def __str__(self) -> str:
        text = f"SQLite {self.version} with {_KINDS.get(self.journal_mode, self.journal_mode)}"
        if self.is_sound:
            return text
        return f"{text}, which this release may damage: stop all that use this home, then start again"


FILE_NAME = "smolora.db"
LOCK_NAME = "smolora.db.lock"
USERS_NAME = "smolora.db.users"  # every process that has the database open locks this file
BUSY_SECONDS = 15
_DAMAGE = (1, 11, 26)  # SQLITE_ERROR (no such table), _CORRUPT and _NOTADB
_IO_ERROR = 10
_TOO_LITTLE_BYTES = 1 << 16  # too few for SQLite's log and the log's index

log = logging.getLogger("smolora.database")


def connect_file(home: Path, journal_mode: JournalMode | None = None) -> sa.Engine:
    """Open and migrate the database in `home`. A missing database is created. The engine is thread-safe.

    If no other process has the file open, set `journal_mode` (None: a mode that is safe with the driver).
    Otherwise keep the file's mode. Raise StartupError as `server.database.connect` does.
    """
    path = home / FILE_NAME
    make(home)
    url = sa.URL.create("sqlite", database=str(path.absolute()))
    engine = sa.create_engine(url, module=driver, connect_args={"timeout": BUSY_SECONDS}, pool_size=16)
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    doubt = _Doubt()
    sa.event.listen(engine, "handle_error", doubt.look_at)
    sa.event.listen(engine, "checkout", doubt.settle)
    try:
        users = os.open(home / USERS_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        unused = weakref.finalize(engine, os.close, users)
        sa.event.listen(engine, "engine_disposed", lambda _: unused())
        with open(home / LOCK_NAME, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time
            fcntl.flock(users, fcntl.LOCK_SH)
            mode = journal_mode or safe_journal_mode(driver.sqlite_version_info)
            (is_alone := partial(_takes_alone, engine, users, mode))()
            migrate(engine, is_alone=is_alone)
        if not (build := build_of(engine)).is_sound:
            log.warning("%s", build)
    except Exception as error:
        engine.dispose()
        if not isinstance(error, OSError | DBAPIError):
            raise
        reason = error.orig if isinstance(error, DBAPIError) else error.strerror
        raise StartupError(f"can't open the database {path}: {in_words(reason, home)}") from error
    return engine


class _Doubt:
    """Keeps a commit that failed because of the disk, such as with EIO, from taking effect later.

    SQLite rolls such a commit back, but the log on the disk may contain all of it. Then the next process that
    opens the database would apply it, unless another commit overwrites it. So this class overwrites it with a
    commit that changes nothing. If that fails, too, this class retries before any other read or write.
    """

    def __init__(self) -> None:
        self._is_left = False

    def look_at(self, context: sa.engine.ExceptionContext) -> None:
        """If `context` has the error of a commit, overwrite the failed commit before the caller gets the error."""
        if context.statement is not None or not isinstance(context.original_exception, driver.OperationalError):
            return
        self._is_left = True
        if context.connection is not None:
            self.settle(cast("sqlite3.Connection", context.connection.connection.dbapi_connection))

    def settle(self, connection: "sqlite3.Connection", *_: object) -> None:
        """Overwrite the failed commit, if there is one and `connection` isn't in a transaction."""
        if not self._is_left or connection.in_transaction:
            return
        with suppress(driver.Error):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version={version}")
            self._is_left = False


class Commits:
    """A callable whose result, a number, changes whenever any process commits. A call takes microseconds."""

    def __init__(self, home: Path) -> None:
        self._connection = driver.connect(
            home / FILE_NAME, timeout=0, isolation_level=None, check_same_thread=False
        )
        self._last = 0

    def __call__(self) -> int:
        """Return a number that changes with each commit. Not thread-safe.

        If the number isn't known now, return the last known one.
        """
        if (number := self.now()) is not None:
            self._last = number
        return self._last

    def now(self) -> int | None:
        """Return a number that changes with each commit, or None if it isn't known now.

        For example, it isn't known while another process commits and there is no write-ahead log.
        """
        try:
            (number,) = self._connection.execute("PRAGMA data_version").fetchone()
        except driver.Error:
            return None
        return int(number)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def build_of(engine: sa.Engine) -> Build:
    """Return the SQLite release and the database's journal mode."""
    with reader_of(engine).connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    return Build(driver.sqlite_version, str(mode))


def faults(home: Path) -> list[str]:
    """Return the faults of the database's file, or an empty list if it is sound. The rows' meaning isn't checked.

    Raise StartupError if the file can't be checked now: the disk is full, for example, or a foreign program has
    locked the file.
    """
    path = home / FILE_NAME
    if not path.exists():
        return ["is missing"]
    try:
        with closing(driver.connect(path, timeout=BUSY_SECONDS)) as connection:
            found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(20)") if line != "ok"]
            for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
                found.append(f"row {row} of {table} refers to what {parent} doesn't have")
            connection.execute("SELECT version_num FROM alembic_version")
    except driver.Error as error:
        code = getattr(error, "sqlite_errorcode", _DAMAGE[0]) & 0xFF
        if code in _DAMAGE or (code == _IO_ERROR and not _is_full(home)):
            return [str(error)]
        raise StartupError(f"can't look at the database {path}: {in_words(error, home)}") from None
    return found


def copy(home: Path, target: Path) -> None:
    """Write a snapshot of the database to the new file `target` while other processes use it.

    No migration is run. Raise StartupError if there is no database, or if it is damaged.
    """
    path = existing(home)
    try:
        users = os.open(home / USERS_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(users, fcntl.LOCK_SH)  # so that no process sets it aside meanwhile
            copy_alone(home, target)
        finally:
            os.close(users)
    except OSError as error:
        raise StartupError(f"can't copy the database {path}: {error}") from None


def copy_alone(home: Path, target: Path) -> None:
    """Copy the database as `copy` does. The caller must make sure that no process renames the file meanwhile."""
    path = existing(home)
    try:
        with (
            closing(driver.connect(path, timeout=BUSY_SECONDS)) as source,
            closing(driver.connect(target)) as copied,
        ):
            source.backup(copied)
    except driver.Error as error:
        raise StartupError(f"can't copy the database {path}: {in_words(error, home)}") from None


def schema_of(path: Path) -> str:
    """Return the schema's revision in a database's file. Raise StartupError if the file can't be read."""
    try:
        with closing(driver.connect(path, timeout=BUSY_SECONDS)) as connection:
            (schema,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except (driver.Error, TypeError) as error:
        raise StartupError(f"can't read the database {path}: {in_words(error, path.parent)}") from None
    return str(schema)


@contextmanager
def opened_copy(copied: Path, scratch: Path) -> Iterator[tuple[sa.Engine, Path]]:
    """Open and migrate a temporary copy of `copied`, a file that `copy` wrote.

    Yield the temporary copy's engine, and its folder below `scratch`. Raise StartupError if the copy can't be
    opened.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        shutil.copyfile(copied, Path(name) / FILE_NAME)
        engine = connect_file(Path(name))
        try:
            yield engine, Path(name)
        finally:
            engine.dispose()


def existing(home: Path) -> Path:
    """Return the path of the database's file in a HOME. Raise StartupError if the file doesn't exist."""
    path = home / FILE_NAME
    if not path.exists():
        raise StartupError(f"{home} isn't a server's home: it has no {FILE_NAME}; give --home or SMOLORA_HOME")
    return path


@contextmanager
def nobody_has_it_open(home: Path) -> Iterator[None]:
    """Keep all other processes from opening the database in `home` during the block.

    Raise StartupError if another process already has the database open.
    """
    users = os.open(home / USERS_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"a server or a worker is using {home}: stop it first") from None
        yield
    finally:
        os.close(users)


def set_aside(home: Path) -> list[str]:
    """Rename the database's files, if any, so that the next `connect` creates a database. Return the new names."""
    number = 1
    while (home / f"{FILE_NAME}.damaged-{number}").exists():
        number += 1
    moved = []
    for suffix in ("", "-wal", "-shm", "-journal"):
        if (path := home / f"{FILE_NAME}{suffix}").exists():
            path.rename(home / f"{FILE_NAME}.damaged-{number}{suffix}")
            moved.append(f"{FILE_NAME}.damaged-{number}{suffix}")
    return moved


def _is_full(home: Path) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(home).free < _TOO_LITTLE_BYTES
    return False


def in_words(error: object, home: Path) -> str:
    """Return an error's message. If the disk is full, return "the disk is full" instead.

    SQLite's own message may only mention an I/O error.
    """
    return "the disk is full" if _is_full(home) else str(error)


def _takes_alone(engine: sa.Engine, users: int, mode: JournalMode) -> bool:
    """Return whether no other process has the database open, and set the journal mode if so.

    `users` is a descriptor of the lock file. Each process that has the database open holds a shared lock on it, so
    only a process that is alone gets the exclusive lock. Afterwards this process holds the shared lock. A foreign
    program takes no lock and isn't noticed, but while it has the database open, the journal mode stays as it is.
    """
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        fcntl.flock(users, fcntl.LOCK_SH)
    with (
        suppress(OperationalError),
        reader_of(engine).connect() as connection,
    ):
        connection.exec_driver_sql(f"PRAGMA journal_mode={mode}")
    return True


def _configure(connection: "sqlite3.Connection", _: ConnectionPoolEntry) -> None:
    """Set SQLite's options of a connection."""
    connection.isolation_level = None  # Python's sqlite3 must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
