"""Tells of commits to a PostgreSQL database: a thread listens, and whoever asks reads a number.

The database on a PostgreSQL server, for any number of processes on any number of machines.

A transaction takes one lock, which the whole database shares, as it begins, and the server lets go of it after
the commit can be seen. So there is one writer at a time, as with SQLite, and what was written for that holds here,
under READ COMMITTED and without serialization failures. Single reads (isolation level AUTOCOMMIT) wait for nobody.

Whoever wants a connection, to read or to write, waits `patience` seconds for a server that can't be reached, but
PATIENCE_SECONDS at most: a worker that only reads can be stopped. A transaction that the server, or the way to
it, cut off has no effect, and raises Interrupted: `transact` runs it again, for all of `patience`. Only of a
commit that isn't answered can't that be known. So each transaction leaves its number in a row of its
connection's own (`marks`), and who lost a commit looks, once the lock says that its session has ended, whether
the number is there. Each commit also notifies whoever listens (`server.database.postgres`).
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from adapters.errors import InDoubt, Interrupted, InvalidInput, Unavailable
from adapters.sql import PATIENCE, back_off, reader_of
from server.database.migrating import migrate
from server.database.opening import PATIENCE_SECONDS
from server.errors import StartupError

CHANNEL = "smolora_commits"
SILENT_SECONDS = 3.0
"""After so long without a sign of the server, nobody trusts the number any more."""

_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.1

log = logging.getLogger("smolora.database")


class Notices:
    """A number that moves whenever anybody commits, this process or another; one read takes a microsecond.

    This process's own commits, whose notices say `own`, count as they are done, others' when their notice arrives.
    While the server isn't heard the number moves at each look, so that nothing that was remembered is taken for
    current. Thread-safe.
    """

    def __init__(self, open_one: "Callable[[], psycopg.Connection[Any]]") -> None:
        self.own = uuid.uuid4().hex
        self._open = open_one
        self._number = 0
        self._heard_at = float("-inf")
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self) -> int:
        if time.monotonic() - self._heard_at > SILENT_SECONDS:
            self.count()
        return self._number

    def count(self) -> None:
        """Somebody has committed, or may have."""
        with self._lock:
            self._number += 1

    def start(self) -> None:
        """Listen from now on; the first time counts."""
        with self._lock:
            if self._thread is None and not self._is_closed.is_set():
                self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Listen no more. The thread ends within a moment."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                with self._open() as connection:
                    connection.autocommit = True
                    self._listen(connection)
            except psycopg.Error as error:
                if self._heard_at > 0:
                    log.warning("commits of others aren't heard just now: %s", type(error).__name__)
                self._heard_at = float("-inf")
            self._is_closed.wait(_RETRY_SECONDS)

    def _listen(self, connection: "psycopg.Connection[Any]") -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        while not self._is_closed.is_set():
            self.count()  # at first: what was committed meanwhile wasn't heard
            self._heard_at = time.monotonic()
            while not self._hears(connection):
                connection.execute("SELECT 1")  # is it still there?
                self._heard_at = time.monotonic()
                if self._is_closed.is_set():
                    return

    def _hears(self, connection: "psycopg.Connection[Any]") -> bool:
        """Whether another process has committed within a moment."""
        payloads = {notice.payload for notice in connection.notifies(timeout=_LOOK_SECONDS, stop_after=1)}
        return bool(payloads - {self.own})


WRITERS_LOCK = 0x736D6F6C6F7261  # "smolora"
BESIDE_WRITERS = "beside_writers"
"""An execution option of transactions that don't take the lock, and may be lost in a crash of the server."""

CONNECT_SECONDS = 5
LOCK_SECONDS = 10
_IDLE_SECONDS = 30  # in a transaction: a machine that stands still then loses it, and the lock
_DOUBT_SECONDS = 15.0  # for a commit's outcome to be known, before nobody waits any longer
_MIN_VERSION = 13_00_00
_DEFAULTS: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "smolora",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_SETTINGS = f"SET lock_timeout = '{LOCK_SECONDS}s'; SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'"
_OVER = {  # SQLSTATEs: the session has ended, or is of no use any more
    "25006": "the server became a standby",
    "25P03": "it was idle in a transaction for too long",
    "57P01": "the server shuts down, or an administrator ended it",
    "57P02": "the server crashed",
    "57P05": "it was idle for too long",
}

_MARKS = "CREATE TABLE marks (connection uuid PRIMARY KEY, number bigint NOT NULL, at timestamptz NOT NULL)"
_MARK = (
    "WITH mark AS (INSERT INTO marks (connection, number, at) VALUES (%s, 1, now()) ON CONFLICT (connection) "
    "DO UPDATE SET number = marks.number + 1, at = now() RETURNING number) "
    "SELECT number, pg_notify(%s, %s) FROM mark"
)


Open = Callable[[], "psycopg.Connection[Any]"]


def connect_server(url: str, patience: float) -> sa.Engine:
    """The database that the URL names, with all migrations run. Thread-safe; see SQLAlchemy.

    `patience`: seconds for which a connection is tried again, and a transaction that was interrupted.
    Raises StartupError, which never quotes the password.
    """
    open_one = _opener(url)
    engine = sa.create_engine(
        "postgresql+smolora://",
        creator=_retried(open_one, min(patience, PATIENCE_SECONDS)),
        poolclass=_Pool,
        pool_size=8,
        max_overflow=24,
        pool_timeout=LOCK_SECONDS,
        pool_pre_ping=True,
        use_native_hstore=False,
        execution_options={PATIENCE: patience},
    )
    dialect = cast("_Dialect", engine.dialect)
    dialect.open, dialect.notices = open_one, Notices(open_one)
    sa.event.listen(engine, "begin", _begin)
    sa.event.listen(engine, "handle_error", _explain)
    sa.event.listen(engine, "engine_disposed", lambda _: dialect.notices.close())
    try:
        _prepare(open_one)
        migrate(engine.execution_options(waits=True), is_alone=lambda: True)  # or an older one goes on with it
    except StartupError:
        engine.dispose()
        raise
    except (psycopg.Error, DBAPIError, Interrupted) as error:
        engine.dispose()
        raise StartupError(f"SMOLORA_DATABASE_URL: {_without_password(str(_first(error)), url)}") from None
    return engine


def notices_of(engine: sa.Engine) -> Notices:
    """What tells of commits; one for all who ask."""
    notices = cast("_Dialect", engine.dialect).notices
    notices.start()
    return notices


def release_of(engine: sa.Engine) -> str:
    """For a person."""
    with reader_of(engine).connect() as connection:
        return f"PostgreSQL {connection.exec_driver_sql('SHOW server_version').scalar_one()}"


def num_sessions(url: str) -> int:
    """Of servers, workers and commands that have the database open, this caller apart. Raises StartupError."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND application_name = current_setting('application_name')"
    )
    try:
        with _opener(url)() as connection:
            row = connection.execute(query).fetchone()
    except psycopg.Error as error:
        raise StartupError(f"SMOLORA_DATABASE_URL: {_without_password(str(error), url)}") from None
    assert row is not None
    return int(row[0])


class _Pool(QueuePool):
    """A queue of connections, which keeps none that comes back after the engine was disposed of."""

    _is_closed = False

    def dispose(self) -> None:
        self._is_closed = True
        super().dispose()

    def recreate(self) -> "_Pool":
        made = cast("_Pool", super().recreate())
        made._is_closed = True
        return made

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        if self._is_closed:
            super().dispose()

    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except sa.exc.TimeoutError:
            raise Unavailable("the database is busy") from None


class _Dialect(PGDialect_psycopg):
    """psycopg's, with commits whose outcome is known."""

    supports_statement_cache = True
    open: Open
    notices: Notices

    def do_commit(self, dbapi_connection: Any) -> None:  # noqa: ANN401 of SQLAlchemy's pool
        driven = cast("psycopg.Connection[Any]", getattr(dbapi_connection, "dbapi_connection", dbapi_connection))
        if driven.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return
        if dbapi_connection.info.get(BESIDE_WRITERS):
            driven.commit()
            return
        own = dbapi_connection.info.setdefault("mark", str(uuid.uuid4()))
        row = driven.execute(_MARK, [own, CHANNEL, self.notices.own]).fetchone()
        assert row is not None
        try:
            driven.commit()
        except psycopg.OperationalError:
            if not driven.closed or not self._was_committed(own, row[0]):
                raise
        self.notices.count()

    def do_rollback(self, dbapi_connection: Any) -> None:  # noqa: ANN401 likewise
        driven = cast("psycopg.Connection[Any]", getattr(dbapi_connection, "dbapi_connection", dbapi_connection))
        try:
            if not driven.closed:
                driven.rollback()
        except psycopg.OperationalError:  # the server does it, as the session ends
            driven.close()

    def _was_committed(self, own: str, number: int) -> bool:
        """Whether the transaction of that number was. Raises InDoubt where that can't be found out."""
        until = time.monotonic() + _DOUBT_SECONDS
        while time.monotonic() < until:
            try:
                with self.open() as connection:
                    # whoever has not ended yet has the lock
                    connection.execute("SELECT pg_advisory_xact_lock(%s)", [WRITERS_LOCK])
                    query = "SELECT number FROM marks WHERE connection = %s"
                    row = connection.execute(query, [own]).fetchone()
                    return row is not None and row[0] >= number
            except psycopg.OperationalError:
                time.sleep(_RETRY_SECONDS)
        log.error("the database went away as it was told to commit, and whether it did isn't known")
        raise InDoubt


registry.register("postgresql.smolora", __name__, "_Dialect")


def _opener(url: str) -> Open:
    """Opens connections to the URL's database. Raises StartupError, unquoted, where libpq can't read it."""
    try:
        given = conninfo_to_dict(url)
        complete = make_conninfo("", **{**_DEFAULTS, **given})
    except psycopg.Error:
        raise StartupError(
            "SMOLORA_DATABASE_URL can't be read: give postgresql://user:password@host:port/database, special "
            "characters of the password as %40 and the like"
        ) from None

    def open_one() -> "psycopg.Connection[Any]":
        connection = psycopg.connect(complete, autocommit=True)
        try:
            connection.execute(_SETTINGS)
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    return open_one


def _retried(open_one: Open, seconds: float) -> Open:
    """Return `open_one` with retries: if the server can't be reached, it tries again for up to `seconds`."""

    def open_patiently() -> "psycopg.Connection[Any]":
        until = time.monotonic() + seconds
        while True:
            try:
                return open_one()
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            back_off()

    return open_patiently


def _prepare(open_one: Open) -> None:
    """See that the server will do, and make what `_Dialect` needs. Raises StartupError."""
    with open_one() as connection:
        if connection.info.server_version < _MIN_VERSION:
            raise StartupError("SMOLORA_DATABASE_URL: PostgreSQL 13 or newer is needed")
        row = connection.execute("SHOW server_encoding").fetchone()
        if row is None or row[0] != "UTF8":
            raise StartupError("SMOLORA_DATABASE_URL: the database's encoding must be UTF8: createdb -E UTF8")
        connection.execute(
            "SELECT set_config('lock_timeout', '0', true), pg_advisory_xact_lock(%s)", [WRITERS_LOCK]
        )
        row = connection.execute("SELECT to_regclass('marks')").fetchone()
        if row is None or row[0] is None:
            connection.execute(_MARKS)
        connection.execute("DELETE FROM marks WHERE at < now() - interval '1 day'")  # of connections long gone


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("isolation_level") == "AUTOCOMMIT":
        return
    connection.info[BESIDE_WRITERS] = is_beside = bool(options.get(BESIDE_WRITERS))
    if is_beside:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
        return
    if options.get("waits"):
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})")


def _explain(context: sa.engine.ExceptionContext) -> None:
    """Raise what the server's callers know, in the place of what psycopg says."""
    error = context.original_exception
    if context.is_pre_ping:
        return
    if isinstance(error, UnicodeEncodeError) or (isinstance(error, psycopg.DataError) and "NUL" in str(error)):
        raise InvalidInput.of("text", "must not have NUL characters or halves of surrogate pairs") from None
    if not isinstance(error, psycopg.Error):
        return
    if error.sqlstate in _OVER:
        context.is_disconnect = True
    if isinstance(error, psycopg.OperationalError) or error.sqlstate in _OVER:
        log.warning("the database: %s", type(error).__name__)
        raise Interrupted from error


def _first(error: BaseException) -> BaseException:
    """What the driver said."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig
    return error.__cause__ or error


def _without_password(message: str, url: str) -> str:
    password = conninfo_to_dict(url).get("password")
    told = " ".join(message.split())
    return told.replace(str(password), "…") if password else told
