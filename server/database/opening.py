"""Open the database, and check that its rows and the stored bytes belong together.

The database is the file under HOME or, if SMOLORA_DATABASE_URL is set, on a PostgreSQL server. The bytes of
adapters, data sets and files are in a place: a HOME or a bucket. The database stores an id of this place, and the
place contains a mark, which is an empty file with the id as its name. The first server that starts writes the id
and the mark. So all servers on one database have to use the same place. If the database is a file and the bytes
are in the same HOME, no mark is needed.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from adapters.catalog.records import Records
from adapters.errors import Unavailable
from adapters.sql import transact
from server.database import file
from server.database.file import JournalMode
from server.errors import StartupError
from server.storage.home import make
from server.system.messages import plural

MOVING = "moving-"
"""Prefix of the id of a bucket that `smolora move` is filling, for a database without rows."""

metadata = sa.MetaData()

places = sa.Table(
    "bytes_place",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("place", sa.String(64), nullable=False),
    sa.Column("url", sa.Text, nullable=False),  # for a person; no credentials
)


class Place(Protocol):
    """Where stored bytes are: a HOME if `is_home` is true, else a bucket."""

    @property
    def is_home(self) -> bool: ...
    @property
    def url(self) -> str: ...
    def has_mark(self, place: str) -> bool: ...
    def mark(self, place: str) -> None: ...


def agree(engine: sa.Engine, place: Place) -> None:
    """Check that `place` is the HOME or bucket with the database's bytes. If none is recorded, record `place`.

    Raise StartupError if the database records another place, or if `smolora move` hasn't finished.
    """

    def work(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(places)).one_or_none()
        if row is None and not (place.is_home and is_file(engine)):
            put_place(connection, place)
        elif row is not None and row.place.startswith(MOVING):
            raise StartupError("smolora move is at work on this database, or was cut off: run it again")
        elif row is not None and ((place.is_home and is_file(engine)) or not place.has_mark(row.place)):
            setting = "SMOLORA_HOME" if place.is_home else "SMOLORA_BYTES_URL"
            raise StartupError(
                f"{setting}: this database's adapters and data are in {row.url}, and not in {place.url}: give all "
                "servers and workers on it the same place"
            )

    transact(engine, work)


def refuse_elsewhere(engine: sa.Engine, why: str) -> None:
    """Raise StartupError if the database of a HOME keeps its adapters and data in an object store.

    The message ends with `why`, the reason for the refusal.
    """
    with engine.connect() as connection:
        if (where := connection.execute(sa.select(places.c.url)).scalar_one_or_none()) is not None:
            raise StartupError(f"this HOME's adapters and data are in {where}: {why}")


def put_place(connection: sa.Connection, place: Place, prefix: str = "") -> str:
    """Record, within a transaction, that the database's bytes are in `place`.

    Return the place's new id, which begins with `prefix`.
    """
    made = prefix + secrets.token_hex(16)
    place.mark(made)  # first: if the commit fails, a spare mark does no harm
    connection.execute(sa.delete(places))
    connection.execute(sa.insert(places).values(id=1, place=made, url=place.url))
    return made


def place_in(connection: sa.Connection) -> str | None:
    """Return the id of the HOME or bucket with the database's bytes.

    Return None if no server has started yet, or if the database is a file and the bytes are in its HOME.
    """
    return connection.execute(sa.select(places.c.place)).scalar_one_or_none()


PATIENCE_SECONDS = 3.0
"""Seconds for which a server retries PostgreSQL while its clients wait."""
WORKER_PATIENCE_SECONDS = 30.0
"""Seconds for which a worker retries writes. Its reads use PATIENCE_SECONDS, so that it can be stopped."""
_LEAVING_SECONDS = 2.0  # until PostgreSQL notices that a process has ended


def connect(
    home: Path,
    journal_mode: JournalMode | None = None,
    *,
    url: str | None = None,
    patience: float = PATIENCE_SECONDS,
) -> sa.Engine:
    """Open and migrate the database at `url` or, if that is None, the file in `home`.

    The engine is thread-safe. `journal_mode` is for the file. On PostgreSQL, lost connections are retried for
    `patience` seconds. Raise StartupError if the database can't be opened, has a schema that this version doesn't
    know, or has an older schema while an older process has the file open.
    """
    if url is None:
        return file.connect_file(home, journal_mode)
    make(home)
    try:
        from server.database.postgres import connect_server
    except ImportError as error:
        raise _lacks_psycopg(error) from None
    return connect_server(url, patience)


def refuse_in_use(url: str) -> None:
    """Raise StartupError if a server, a worker or a command has the PostgreSQL database open."""
    try:
        from server.database.postgres import num_sessions
    except ImportError as error:
        raise _lacks_psycopg(error) from None
    until = time.monotonic() + _LEAVING_SECONDS
    while num := num_sessions(url):
        if time.monotonic() > until:
            raise StartupError(
                f"SMOLORA_DATABASE_URL: {plural(num, 'connection')} of servers, workers or commands: stop all of "
                "them first"
            )
        time.sleep(0.1)


def refuse_unused(url: str) -> None:
    """Raise StartupError if no server has started with the PostgreSQL database yet. The database isn't changed."""
    try:
        from server.database.postgres import has_place
    except ImportError as error:
        raise _lacks_psycopg(error) from None
    if not has_place(url):
        raise StartupError("SMOLORA_DATABASE_URL: no server has used this database yet: is it the right one?")


def commits_of(engine: sa.Engine, home: Path) -> Callable[[], int]:
    """Return a function whose result changes whenever any process commits. A call takes microseconds."""
    if is_file(engine):
        return file.Commits(home)
    from server.database.postgres import notices_of

    return notices_of(engine)


def commits_at_once(engine: sa.Engine, home: Path) -> Callable[[], int | None]:
    """Return a function whose result changes with each commit, or is None if a commit may have been missed.

    On PostgreSQL its result is always None, since other processes' commits are noticed a moment late.
    """
    return file.Commits(home).now if is_file(engine) else lambda: None


def silence_of(engine: sa.Engine) -> Callable[[], float]:
    """Return a function that returns for how many seconds the database hasn't answered, or 0 if it answers.

    The function doesn't ask the database. A database file always counts as answering.
    """
    if is_file(engine):
        return lambda: 0.0
    from server.database import postgres

    silence = postgres.silence_of(engine)
    return lambda: silence.seconds


def records_of(engine: sa.Engine, adapters: Path) -> Records | None:
    """Return the files in the folder `adapters` from which adapters' versions in a lost database are restored.

    Return None on PostgreSQL: it has its own backups (pg_dump, replicas), and several smolora servers don't share
    a folder.
    """
    return Records(adapters) if is_file(engine) else None


def without_writers_lock(engine: sa.Engine, *, is_losable: bool = False) -> sa.Engine:
    """Return an engine for short transactions that don't wait for other writers, and that notify nobody.

    If `is_losable`, they don't wait for the disk either: a crash of the database server may lose them. A file
    has a single writer in any case, so for a file the result is `engine`.
    """
    if is_file(engine):
        return engine
    from server.database.postgres import KEPT, LOSABLE, NO_WRITERS_LOCK

    return engine.execution_options(**{NO_WRITERS_LOCK: LOSABLE if is_losable else KEPT})


@contextmanager
def as_startup_error(home: Path) -> Iterator[None]:
    """Turn failures of the database, the object store or the disk in the block into a StartupError of one line."""
    try:
        yield
    except DBAPIError as error:
        raise StartupError(f"the database: {file.in_words(error.orig, home)}") from None
    except Unavailable as error:
        raise StartupError(str(error)) from None
    except BrokenPipeError:  # the reader of standard output has ended
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror or error}") from None


def described(engine: sa.Engine) -> str:
    """Describe the database's software and its release in words."""
    if is_file(engine):
        return str(file.build_of(engine))
    from server.database.postgres import release_of

    return release_of(engine)


def is_file(engine: sa.Engine) -> bool:
    """Return whether the database is a file under HOME."""
    return engine.dialect.name == "sqlite"


def _lacks_psycopg(error: ImportError) -> StartupError:
    return StartupError(
        f"SMOLORA_DATABASE_URL needs psycopg, which isn't installed ({error}): "
        ".venv/bin/pip install -e '.[cluster]' in smolora's folder"
    )
