"""Which build of SQLite drives the database, and whether a write-ahead log is safe with it.

SQLite 3.7.0 to 3.51.2 has a race in WAL mode, the "WAL-reset bug" (https://sqlite.org/wal.html#walresetbug): where
one connection checkpoints while another one commits, pages of a later commit may never reach the database, which
is corrupt then. So the standard library's build is used where it has the fix; else that of pysqlite3, which brings
one of its own; and where that is missing too, the database has a rollback journal, in which the race isn't.

Tries again what a server refuses that starts anew.

The database as one SQLite file under HOME, brought up to date whenever it is opened.

Every committed write survives a power cut (synchronous=FULL), and a writer waits for another one up to
`BUSY_SECONDS`. A transaction takes the write lock as it begins, so that it can't fail halfway because another
process wrote meanwhile. Single reads run without a transaction (isolation level AUTOCOMMIT): with a write-ahead
log they wait for nobody, with a rollback journal for the moment in which somebody commits. Which of the two it is,
`server.database.file` says; which tables there are, `server.database.migrations`.
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
"""SQLite's names: a write-ahead log, or a rollback journal, which each commit deletes."""

_KINDS = {"wal": "a write-ahead log", "delete": "a rollback journal"}


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether that release of SQLite has it. 3.44.6 and 3.50.7 are older branches that got the fix, too."""
    has_fix = (3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51)
    return (3, 7) <= version < (3, 51, 3) and not has_fix


def choose_driver(standard: ModuleType, other: str) -> ModuleType:
    """`standard` where its build is sound, or where the module called `other` isn't installed or no better."""
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
    """What a build of that release can be trusted with."""
    return "delete" if has_wal_reset_bug(version) else "wal"


@dataclass(frozen=True)
class Build:
    """What drives a database, and how that keeps its commits."""

    version: str
    journal_mode: str

    @property
    def is_sound(self) -> bool:
        """Whether the write-ahead log, if there is one, is safe."""
        major, minor, patch = map(int, self.version.split("."))
        return self.journal_mode != "wal" or not has_wal_reset_bug((major, minor, patch))

    def __str__(self) -> str:
        text = f"SQLite {self.version} with {_KINDS.get(self.journal_mode, self.journal_mode)}"
        if self.is_sound:
            return text
        return f"{text}, which this release may damage: stop all that use this home, then start again"


FILE_NAME = "smolora.db"
LOCK_NAME = "smolora.db.lock"
USERS_NAME = "smolora.db.users"  # locked by every process that has the database open, for as long as it has
BUSY_SECONDS = 15
_DAMAGE = (1, 11, 26)  # SQLITE_ERROR (no such table), _CORRUPT and _NOTADB
_IO_ERROR = 10
_TOO_LITTLE_BYTES = 1 << 16  # for SQLite's log and its index

log = logging.getLogger("smolora.database")


def connect_file(home: Path, journal_mode: JournalMode | None = None) -> sa.Engine:
    """The database in `home`, which is made if need be, with all migrations run. Thread-safe; see SQLAlchemy.

    Who opens it alone chooses its journal, by default one that is safe with the driver; all others go by that.
    Raises StartupError where it can't be opened, is a newer smolora's, or an older one's that has it open.
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
            fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time gets this far
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
        raise StartupError(f"can't open the database {path}: {told(reason, home)}") from error
    return engine


class _Doubt:
    """Settles commits that failed on the disk, such as at the sync of the log (EIO): they are undone for good.

    SQLite rolls them back, but they may stand whole at the end of the log, where the next process that opens the
    database finds them, unless another commit took their place. So one that changes nothing does; where that
    fails, too, it is tried again before anything else is read or written.
    """

    def __init__(self) -> None:
        self._is_left = False

    def look_at(self, context: sa.engine.ExceptionContext) -> None:
        """After an error, before whoever asked hears of it."""
        if context.statement is not None or not isinstance(context.original_exception, driver.OperationalError):
            return
        self._is_left = True
        if context.connection is not None:
            self.settle(cast("sqlite3.Connection", context.connection.connection.dbapi_connection))

    def settle(self, connection: "sqlite3.Connection", *_: object) -> None:
        """Where a commit is in doubt."""
        if not self._is_left or connection.in_transaction:
            return
        with suppress(driver.Error):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version={version}")
            self._is_left = False


class Commits:
    """A number that moves whenever anybody commits, this process or another; one read takes microseconds."""

    def __init__(self, home: Path) -> None:
        self._connection = driver.connect(
            home / FILE_NAME, timeout=0, isolation_level=None, check_same_thread=False
        )
        self._last = 0

    def __call__(self) -> int:
        """For one thread at a time. While somebody is just committing, what it was before."""
        if (number := self.now()) is not None:
            self._last = number
        return self._last

    def now(self) -> int | None:
        """Likewise, but None where that can't be said, as while somebody is just committing without a log."""
        try:
            (number,) = self._connection.execute("PRAGMA data_version").fetchone()
        except driver.Error:
            return None
        return int(number)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


def build_of(engine: sa.Engine) -> Build:
    """What drives the database."""
    with reader_of(engine).connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    return Build(driver.sqlite_version, str(mode))


def faults(home: Path) -> list[str]:
    """What is wrong with the file itself, however it is filled; nothing where it is sound. Changes nothing.

    Raises StartupError where that can't be told just now: the disk is full, say, or a stranger has locked it.
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
        raise StartupError(f"can't look at the database {path}: {told(error, home)}") from None
    return found


def copy(home: Path, target: Path) -> None:
    """Write the database as it is at one moment to the new file `target`, while others use it.

    No migration is run. Raises StartupError where there is no database, or it is damaged.
    """
    path = existing(home)
    try:
        users = os.open(home / USERS_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(users, fcntl.LOCK_SH)  # nobody sets it aside meanwhile
            copy_alone(home, target)
        finally:
            os.close(users)
    except OSError as error:
        raise StartupError(f"can't copy the database {path}: {error}") from None


def copy_alone(home: Path, target: Path) -> None:
    """`copy`, for who knows that nobody sets it aside meanwhile."""
    path = existing(home)
    try:
        with (
            closing(driver.connect(path, timeout=BUSY_SECONDS)) as source,
            closing(driver.connect(target)) as copied,
        ):
            source.backup(copied)
    except driver.Error as error:
        raise StartupError(f"can't copy the database {path}: {told(error, home)}") from None


def schema_of(path: Path) -> str:
    """The newest migration of a database's file. Raises StartupError."""
    try:
        with closing(driver.connect(path, timeout=BUSY_SECONDS)) as connection:
            (schema,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except (driver.Error, TypeError) as error:
        raise StartupError(f"can't read the database {path}: {told(error, path.parent)}") from None
    return str(schema)


@contextmanager
def opened_copy(copied: Path, scratch: Path) -> Iterator[tuple[sa.Engine, Path]]:
    """A copy of what `copy` made, brought up to date, and the folder below `scratch` that it lies in for a while.

    Raises StartupError.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        shutil.copyfile(copied, Path(name) / FILE_NAME)
        engine = connect_file(Path(name))
        try:
            yield engine, Path(name)
        finally:
            engine.dispose()


def existing(home: Path) -> Path:
    """The file of a HOME that is there already. Raises StartupError where none is."""
    path = home / FILE_NAME
    if not path.exists():
        raise StartupError(f"{home} isn't a server's home: it has no {FILE_NAME}; give --home or SMOLORA_HOME")
    return path


@contextmanager
def nobody_has_it_open(home: Path) -> Iterator[None]:
    """A block in which no process has or gets the database open. Raises StartupError where one has."""
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
    """Rename the database's files, if any, so that the next `connect` makes new ones; the names they got."""
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


def told(error: object, home: Path) -> str:
    """For a person: where SQLite has no room it tells of an I/O error."""
    return "the disk is full" if _is_full(home) else str(error)


def _takes_alone(engine: sa.Engine, users: int, mode: JournalMode) -> bool:
    """Whether nobody else has the database open, by the lock that all its users share; this one goes on to.

    If so it turns the file to that journal, unless a stranger, who takes no lock of ours, has it open.
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
    """Sets what SQLite keeps for each connection."""
    connection.isolation_level = None  # Python's sqlite3 must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
