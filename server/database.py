"""The database under HOME: one SQLite file, brought up to date whenever it is opened.

Every committed write survives a power cut (WAL, synchronous=FULL), readers never wait for writers, and a writer
waits for another one up to `BUSY_SECONDS`. A transaction takes the write lock as it begins, so that it can't
fail halfway because another process wrote meanwhile. Single reads run without a transaction (isolation level
AUTOCOMMIT) and take no lock. Which tables there are is said in `server.migrations`.
"""

import fcntl
import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from server.errors import StartupError

FILE_NAME = "smolora.db"
LOCK_NAME = "smolora.db.lock"
USERS_NAME = "smolora.db.users"  # locked by every process that has the database open, for as long as it has
BUSY_SECONDS = 15


def connect(home: Path) -> sa.Engine:
    """The database in `home`, which is made if need be, with all migrations run. Thread-safe; see SQLAlchemy.

    Raises StartupError where the file can't be opened, or was written by a newer smolora.
    """
    path = home / FILE_NAME
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"can't make the folder {home}: {error.strerror}") from error
    url = sa.URL.create("sqlite", database=str(path.absolute()))
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, pool_size=16)
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    try:
        users = os.open(home / USERS_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        unused = weakref.finalize(engine, os.close, users)
        sa.event.listen(engine, "engine_disposed", lambda _: unused())
        fcntl.flock(users, fcntl.LOCK_SH)
        with open(home / LOCK_NAME, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two who turn one new file to WAL at once would both fail
            migrate(engine)
    except CommandError as error:
        engine.dispose()
        raise StartupError(f"{path} was written by a newer version of smolora ({error})") from error
    except (OSError, DBAPIError) as error:
        engine.dispose()
        reason = error.orig if isinstance(error, DBAPIError) else error.strerror
        raise StartupError(f"can't open the database {path}: {reason}") from error
    return engine


def faults(home: Path) -> list[str]:
    """What is wrong with the file itself, however it is filled; nothing where it is sound. Changes nothing."""
    path = home / FILE_NAME
    if not path.exists():
        return ["is missing"]
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(20)") if line != "ok"]
            for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
                found.append(f"row {row} of {table} refers to what {parent} doesn't have")
            connection.execute("SELECT version_num FROM alembic_version")
    except sqlite3.Error as error:
        return [str(error)]
    return found


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
    for suffix in ("", "-wal", "-shm"):
        if (path := home / f"{FILE_NAME}{suffix}").exists():
            path.rename(home / f"{FILE_NAME}.damaged-{number}{suffix}")
            moved.append(f"{FILE_NAME}.damaged-{number}{suffix}")
    return moved


def migrate(engine: sa.Engine) -> None:
    """Runs all missing migrations, in one transaction."""
    config = Config()
    config.set_main_option("script_location", "server:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _configure(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    """Sets what SQLite keeps for each connection; the first one of all turns the file to WAL, for good."""
    connection.isolation_level = None  # Python's sqlite3 must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
