"""The database under HOME: one SQLite file, brought up to date whenever it is opened.

Every committed write survives a power cut (WAL, synchronous=FULL), readers never wait for writers, and a writer
waits for another one up to `BUSY_SECONDS`. A transaction takes the write lock as it begins, so that it can't
fail halfway because another process wrote meanwhile. Single reads run without a transaction (isolation level
AUTOCOMMIT) and take no lock. Which tables there are is said in `server.migrations`.
"""

import fcntl
import sqlite3
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
