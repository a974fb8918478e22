"""Which place has the bytes that the rows name: an id in the database, and a mark of that id where they are.

Who starts first makes both. So no server can work with another bucket, or another HOME, than those beside it.
The file under HOME has its bytes beside it unless it says otherwise, and needs no mark.

Which database it is: the file under HOME, or a PostgreSQL server's, by SMOLORA_DATABASE_URL.
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
from adapters.catalog.tables import transact
from adapters.errors import Unavailable
from server.database import file
from server.database.file import JournalMode
from server.errors import StartupError
from server.storage.home import make
from server.system.messages import plural

MOVING = "moving-"
"""How the id begins of a place that `smolora move` fills just now, for a database that has nothing yet."""

metadata = sa.MetaData()

places = sa.Table(
    "bytes_place",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # of its one row: 1
    sa.Column("place", sa.String(64), nullable=False),
    sa.Column("told", sa.Text, nullable=False),  # for a person; no credentials
)


class Place(Protocol):
    """Where bytes are. `is_home`: in HOME alone."""

    @property
    def is_home(self) -> bool: ...
    @property
    def url(self) -> str: ...
    def has_mark(self, place: str) -> bool: ...
    def mark(self, place: str) -> None: ...


def agree(engine: sa.Engine, place: Place) -> None:
    """See that the database's bytes are there, from now on for good where it has none yet. Raises StartupError."""

    def work(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(places)).one_or_none()
        if row is None and not (place.is_home and is_file(engine)):
            put_place(connection, place)
        elif row is not None and row.place.startswith(MOVING):
            raise StartupError("smolora move is at work on this database, or was cut off: run it again")
        elif row is not None and ((place.is_home and is_file(engine)) or not place.has_mark(row.place)):
            raise StartupError(
                f"{'SMOLORA_HOME' if place.is_home else 'SMOLORA_BYTES_URL'}: this database's adapters and data "
                f"are in {row.told}, and not in {place.url}: give all servers and workers on it the same place"
            )

    transact(engine, work)


def refuse_elsewhere(engine: sa.Engine, why: str) -> None:
    """Raises StartupError where the bytes of a file under HOME are in an object store, and says `why`."""
    with engine.connect() as connection:
        if (told := connection.execute(sa.select(places.c.told)).scalar_one_or_none()) is not None:
            raise StartupError(f"this HOME's adapters and data are in {told}: {why}")


def put_place(connection: sa.Connection, place: Place, prefix: str = "") -> str:
    """Mark the place and name it, in the place of any other, within a transaction; the id, after `prefix`."""
    made = prefix + secrets.token_hex(16)
    place.mark(made)  # first: where the commit fails, a mark too many does no harm
    connection.execute(sa.delete(places))
    connection.execute(sa.insert(places).values(id=1, place=made, told=place.url))
    return made


def place_in(connection: sa.Connection) -> str | None:
    """The id; None where no server has started yet, or the bytes are in HOME beside the file."""
    return connection.execute(sa.select(places.c.place)).scalar_one_or_none()


PATIENCE_SECONDS = 3.0
"""For which PostgreSQL is tried again, on a server whose clients wait."""
WORKER_PATIENCE_SECONDS = 30.0
"""The same for what a worker writes. What it reads waits for PATIENCE_SECONDS, so that it can be stopped."""
_LEAVING_SECONDS = 2.0  # for the server to notice that a process has ended


def connect(
    home: Path,
    journal_mode: JournalMode | None = None,
    *,
    url: str | None = None,
    patience: float = PATIENCE_SECONDS,
) -> sa.Engine:
    """The database of `home`, with all migrations run: at `url`, where one is given, else the file in `home`.

    Thread-safe; see SQLAlchemy. `journal_mode` is the file's; `patience` is PostgreSQL's, in seconds.
    Raises StartupError where it can't be opened, was written by a newer smolora, or is an older one's file that
    somebody has open.
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
    """Raises StartupError where a server, a worker or a command has a PostgreSQL database open."""
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


def commits_of(engine: sa.Engine, home: Path) -> Callable[[], int]:
    """A number that moves whenever anybody commits, this process or another; one read takes microseconds."""
    if is_file(engine):
        return file.Commits(home)
    from server.database.postgres import notices_of

    return notices_of(engine)


def commits_at_once(engine: sa.Engine, home: Path) -> Callable[[], int | None]:
    """The same for whoever must not miss one: None where that can't be said just now, or ever.

    PostgreSQL tells of other processes' commits a moment late.
    """
    return file.Commits(home).now if is_file(engine) else lambda: None


def records_of(engine: sa.Engine, adapters: Path) -> Records | None:
    """Of versions, beside their bytes: what the catalog is rebuilt from where the file under HOME is lost.

    None on PostgreSQL: its backups are its own (pg_dump, replicas), and several servers share no folder.
    """
    return Records(adapters) if is_file(engine) else None


def beside_writers(engine: sa.Engine) -> sa.Engine:
    """For short transactions that wait for no writer, and are lost where the server crashes: PostgreSQL alone."""
    from server.database.postgres import BESIDE_WRITERS

    return engine.execution_options(**{BESIDE_WRITERS: True})


@contextmanager
def told_to_a_person(home: Path) -> Iterator[None]:
    """A block in which what the database, an object store or the disk fails with is one line, as StartupError."""
    try:
        yield
    except DBAPIError as error:
        raise StartupError(f"the database: {file.told(error.orig, home)}") from None
    except Unavailable as error:
        raise StartupError(str(error)) from None
    except BrokenPipeError:  # whoever read what is printed
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror or error}") from None


def described(engine: sa.Engine) -> str:
    """What drives the database, for a person."""
    if is_file(engine):
        return str(file.build_of(engine))
    from server.database.postgres import release_of

    return release_of(engine)


def is_file(engine: sa.Engine) -> bool:
    """Whether the database is a file under HOME."""
    return engine.dialect.name == "sqlite"


def _lacks_psycopg(error: ImportError) -> StartupError:
    return StartupError(
        f"SMOLORA_DATABASE_URL needs psycopg, which isn't installed ({error}): "
        "pip install -e '.[cluster]' in smolora's folder"
    )
