"""The database on a PostgreSQL server, for any number of processes on any number of machines.

A transaction takes one lock for the whole database when it begins, and the server releases it after the commit is
visible. So there is one writer at a time, as with SQLite, and code for SQLite is correct on PostgreSQL as well,
under READ COMMITTED and without serialization failures. Single reads (isolation level AUTOCOMMIT) wait for no
writer.

If the server can't be reached, connecting is retried for `patience` seconds, and for PATIENCE_SECONDS at most: a
worker that only reads can't be stopped before the retries end. If the connection is lost in a transaction, the
transaction has no effect and raises Interrupted: `transact` repeats it for all of `patience`.

No thread waits for a server that accepts connections but doesn't answer, for example because its disk hangs. The
server itself ends statements after STATEMENT_SECONDS. If it doesn't even do that, the connection is closed a
moment later (`_Connection`). In a process that runs `Notices`, a silent server is noticed sooner: after
GIVE_UP_SECONDS all statements end, and new ones fail at once until the server answers (`server.database.silence`).

The outcome is unknown only if the connection is lost during a commit. So each transaction writes a number to its
connection's row in the table `marks`. After a lost commit the process writes to the same row, which waits until
the old session has ended, and reads the number. Each commit also notifies all processes (LISTEN and NOTIFY).

Some writes don't take the lock (NO_WRITERS_LOCK), since there are many of them and row locks order them well
enough: usage, the times at which keys were used, rates, leases, the workers' rows, and the metrics of training
steps.
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
from server.database.silence import NOTICED_SECONDS, Silence
from server.errors import StartupError

CHANNEL = "smolora_commits"
SILENT_SECONDS = NOTICED_SECONDS
"""If the server was silent for longer, the number isn't trusted."""

_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.1

log = logging.getLogger("smolora.database")


class Notices:
    """A callable whose result, a number, changes whenever any process commits. Thread-safe.

    A call takes a microsecond. A commit of this process counts immediately, a commit of another process when its
    notice arrives. The notices of this process carry the id `own`, and aren't counted a second time. While the
    server doesn't answer, the number changes at each call, so that no cached value is taken for current.
    `silence` says for how long it hasn't answered.
    """

    def __init__(self, open_one: "Callable[[], psycopg.Connection[Any]]", silence: Silence) -> None:
        self.own = uuid.uuid4().hex
        self.silence = silence
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
        """Count a commit, or one that may have happened unnoticed."""
        with self._lock:
            self._number += 1

    def start(self) -> None:
        """Start the thread that listens for other processes' commits. Further calls have no effect."""
        with self._lock:
            if self._thread is None and not self._is_closed.is_set():
                self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop listening, and wait until the thread has ended, which takes a moment."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            self.silence.asked()
            try:
                with self._open() as connection:
                    connection.autocommit = True
                    self._listen(connection)
            except psycopg.Error as error:
                if self._heard_at > 0:
                    log.warning("can't listen for other processes' commits now: %s", type(error).__name__)
                self._heard_at = float("-inf")
            self._is_closed.wait(_RETRY_SECONDS)

    def _listen(self, connection: "psycopg.Connection[Any]") -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        while not self._is_closed.is_set():
            self.count()  # commits before LISTEN weren't noticed
            self._answered()
            while not self._hears(connection):
                self.silence.asked()
                connection.execute("SELECT 1")  # check that the server still answers
                self._answered()
                if self._is_closed.is_set():
                    return

    def _answered(self) -> None:
        self._heard_at = time.monotonic()
        self.silence.answered()

    def _hears(self, connection: "psycopg.Connection[Any]") -> bool:
        """Wait for a commit, for up to `_LOOK_SECONDS`, and return whether another process made one."""
        payloads = {notice.payload for notice in connection.notifies(timeout=_LOOK_SECONDS, stop_after=1)}
        return bool(payloads - {self.own})


WRITERS_LOCK = 0x736D6F6C6F7261  # "smolora"
NO_WRITERS_LOCK = "no_writers_lock"
"""An execution option: the transaction doesn't take the writers' lock, and notifies nobody.

Its value is LOSABLE or KEPT. A crash of the server may lose a losable transaction, and a lost connection leaves
its outcome unknown. A kept one is as safe as a transaction with the lock.
"""
LOSABLE = "losable"
KEPT = "kept"

CONNECT_SECONDS = 5
LOCK_SECONDS = 3
"""The longest that a transaction waits for a lock. A job's lease is at least three times as long."""
_POOL_SECONDS = 5  # that a thread waits for a free connection
STATEMENT_SECONDS = 15
"""The longest that a statement may take: more than LOCK_SECONDS, since a statement waits for the writers' lock."""
_ANSWER_SECONDS = STATEMENT_SECONDS + 2.0  # the server ends a statement itself before this
GIVE_UP_SECONDS = 2.0
"""Seconds of silence in addition to the engine's patience after which no statement waits any longer."""
_LEAST_SECONDS = 2.0  # that a statement waits, in case that the server answers again
_IDLE_SECONDS = 30  # in a transaction; a suspended machine then loses the transaction and the lock
_DOUBT_SECONDS = 15.0  # to find out whether a commit succeeded, before the caller gets InDoubt
_MIN_VERSION = 13_00_00
_DEFAULTS: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "smolora",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_SETTINGS = (
    f"SET lock_timeout = '{LOCK_SECONDS}s'; SET statement_timeout = '{STATEMENT_SECONDS}s'; "
    f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'"
)
_OVER = {  # SQLSTATEs of a session that has ended or is useless
    "25006": "the server became a standby",
    "25P03": "it was idle in a transaction for too long",
    "57P01": "the server shuts down, or an administrator ended it",
    "57P02": "the server crashed",
    "57P05": "it was idle for too long",
}

_MARKS = "CREATE TABLE marks (connection uuid PRIMARY KEY, number bigint NOT NULL, at timestamptz NOT NULL)"
_MARK = (
    "INSERT INTO marks (connection, number, at) VALUES (%s, 1, now()) ON CONFLICT (connection) "
    "DO UPDATE SET number = marks.number + 1, at = now() RETURNING number"
)
_MARK_AND_NOTIFY = f"WITH mark AS ({_MARK}) SELECT number, pg_notify(%s, %s) FROM mark"  # noqa: S608 it is ours
_READ_MARK = (  # waits until the session that has written the row, but not committed it, has ended
    "INSERT INTO marks (connection, number, at) VALUES (%s, 0, now()) ON CONFLICT (connection) "
    "DO UPDATE SET at = now() RETURNING number"
)


class _Connection(psycopg.Connection[Any]):
    """A connection that is closed if the server doesn't answer a statement in time."""

    silence: Silence | None = None
    is_bounded = True  # false in a migration, whose statements may take long

    def wait(self, gen: Any, *given: Any, **named: Any) -> Any:  # noqa: ANN401 as in psycopg
        try:
            found = super().wait(self._bounded(gen), *given, **named)
        except _NoAnswerError:
            self.close()
            raise
        if self.silence is not None:
            self.silence.heard()
        return found

    def _bounded(self, gen: Any) -> Any:  # noqa: ANN401
        """Wrap a generator of psycopg, which receives 0 several times a second while the socket is silent.

        Raise _NoAnswerError if the server hasn't answered for too long.
        """
        began = time.monotonic()
        ready = None  # starts the generator
        while True:
            try:
                wanted = gen.send(ready)
            except StopIteration as end:
                return end.value
            if not (ready := (yield wanted)) and self.is_bounded:
                waited = time.monotonic() - began
                is_silent = self.silence is not None and self.silence.is_long
                if waited > _ANSWER_SECONDS or (is_silent and waited > _LEAST_SECONDS):
                    raise _NoAnswerError(f"no answer for {waited:.0f} s")


class _NoAnswerError(psycopg.OperationalError):
    """The server accepts connections, and doesn't answer."""


Open = Callable[[], _Connection]


def connect_server(url: str, patience: float) -> sa.Engine:
    """Open and migrate the database at `url`. The engine is thread-safe.

    A lost connection and an interrupted transaction are retried for `patience` seconds. Raise StartupError if the
    database can't be opened or migrated. The message never quotes the password.
    """
    silence = Silence(min(patience, PATIENCE_SECONDS) + GIVE_UP_SECONDS)
    open_one = _opener(url, silence)
    engine = sa.create_engine(
        "postgresql+smolora://",
        creator=_retried(open_one, min(patience, PATIENCE_SECONDS), silence),
        poolclass=_Pool,
        pool_size=8,
        max_overflow=24,
        pool_timeout=_POOL_SECONDS,
        pool_pre_ping=True,
        use_native_hstore=False,
        execution_options={PATIENCE: patience},
    )
    dialect = cast("_Dialect", engine.dialect)
    dialect.open, dialect.notices = open_one, Notices(open_one, silence)
    cast("_Pool", engine.pool).silence = silence
    sa.event.listen(engine, "begin", _begin)
    sa.event.listen(engine, "handle_error", _explain)
    sa.event.listen(engine, "engine_disposed", lambda _: dialect.notices.close())
    try:
        _prepare(open_one)
        migrate(
            engine.execution_options(waits=True), is_alone=lambda: True
        )  # older processes may keep running: revisions only add
    except StartupError:
        engine.dispose()
        raise
    except (psycopg.Error, DBAPIError, Interrupted) as error:
        engine.dispose()
        raise StartupError(f"SMOLORA_DATABASE_URL: {_without_password(str(_first(error)), url)}") from None
    return engine


def notices_of(engine: sa.Engine) -> Notices:
    """Return the engine's counter of commits, and start it."""
    notices = cast("_Dialect", engine.dialect).notices
    notices.start()
    return notices


def silence_of(engine: sa.Engine) -> Silence:
    """Return the object that says for how long the server hasn't answered, and start asking the server."""
    return notices_of(engine).silence


def release_of(engine: sa.Engine) -> str:
    """Return the name and release of the database server, such as "PostgreSQL 16.2"."""
    with reader_of(engine).connect() as connection:
        return f"PostgreSQL {connection.exec_driver_sql('SHOW server_version').scalar_one()}"


def num_sessions(url: str) -> int:
    """Count the sessions of other servers, workers and commands on the database.

    Raise StartupError if the database can't be reached.
    """
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


def has_place(url: str) -> bool:
    """Return whether a server has used the database, and recorded where its adapters and data are.

    Raise StartupError if the database can't be reached.
    """
    try:
        with _opener(url)() as connection:
            row = connection.execute("SELECT to_regclass('bytes_place')").fetchone()
            if row is None or row[0] is None:
                return False
            return connection.execute("SELECT 1 FROM bytes_place").fetchone() is not None
    except psycopg.Error as error:
        raise StartupError(f"SMOLORA_DATABASE_URL: {_without_password(str(error), url)}") from None


class _Pool(QueuePool):
    """A pool of connections. After the engine is disposed of, each connection is closed when it is returned."""

    _is_closed = False

    def dispose(self) -> None:
        self._is_closed = True
        super().dispose()

    def recreate(self) -> "_Pool":
        made = cast("_Pool", super().recreate())
        made.silence = self.silence
        made._is_closed = True
        return made

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is not None:
            cast("_Connection", record.dbapi_connection).is_bounded = True
        super()._do_return_conn(record)
        if self._is_closed:
            super().dispose()

    silence: Silence

    def connect(self) -> PoolProxiedConnection:
        self.silence.admit()
        try:
            return super().connect()
        except sa.exc.TimeoutError:
            raise Unavailable("the database is busy") from None


class _Dialect(PGDialect_psycopg):
    """psycopg's dialect. If the connection is lost during a commit, it finds out whether the commit succeeded."""

    supports_statement_cache = True
    open: Open
    notices: Notices

    def do_commit(self, dbapi_connection: Any) -> None:  # noqa: ANN401 of SQLAlchemy's pool
        driven = cast("psycopg.Connection[Any]", getattr(dbapi_connection, "dbapi_connection", dbapi_connection))
        if driven.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return
        unlocked = dbapi_connection.info.get(NO_WRITERS_LOCK)
        if unlocked == LOSABLE:
            driven.commit()
            return
        own = dbapi_connection.info.setdefault("mark", str(uuid.uuid4()))
        if unlocked:
            row = driven.execute(_MARK, [own]).fetchone()
        else:
            row = driven.execute(_MARK_AND_NOTIFY, [own, CHANNEL, self.notices.own]).fetchone()
        assert row is not None
        try:
            driven.commit()
        except psycopg.OperationalError:
            if not driven.closed or not self._was_committed(own, row[0]):
                raise
        if not unlocked:
            self.notices.count()

    def do_rollback(self, dbapi_connection: Any) -> None:  # noqa: ANN401 likewise
        driven = cast("psycopg.Connection[Any]", getattr(dbapi_connection, "dbapi_connection", dbapi_connection))
        try:
            if not driven.closed:
                driven.rollback()
        except psycopg.OperationalError:  # the session ends, and the server rolls back
            driven.close()

    def _was_committed(self, own: str, number: int) -> bool:
        """Return whether a transaction was committed.

        `own` is the id of the transaction's connection in the table `marks`, and `number` the number that the
        transaction wrote there. Raise InDoubt if the outcome can't be found out in `_DOUBT_SECONDS`.
        """
        until = time.monotonic() + _DOUBT_SECONDS
        while time.monotonic() < until:
            try:
                with self.open() as connection:
                    row = connection.execute(_READ_MARK, [own]).fetchone()
                    assert row is not None
                    return bool(row[0] >= number)
            except psycopg.OperationalError:
                time.sleep(_RETRY_SECONDS)
        log.error("the connection was lost at a commit, and its outcome is unknown")
        raise InDoubt


registry.register("postgresql.smolora", __name__, "_Dialect")


def _opener(url: str, silence: Silence | None = None) -> Open:
    """Return a function that opens a connection to `url`, whose answers it reports to `silence`.

    Raise StartupError, without quoting the URL, if libpq can't parse it.
    """
    try:
        given = conninfo_to_dict(url)
        complete = make_conninfo("", **{**_DEFAULTS, **given})
    except psycopg.Error:
        raise StartupError(
            "SMOLORA_DATABASE_URL can't be read: give postgresql://user:password@host:port/database, special "
            "characters of the password as %40 and the like"
        ) from None

    def open_one() -> _Connection:
        connection: _Connection = _Connection.connect(complete, autocommit=True)
        connection.silence = silence
        try:
            connection.execute(_SETTINGS)
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    return open_one


def _retried(open_one: Open, seconds: float, silence: Silence) -> Open:
    """Return `open_one` with retries: if the server can't be reached, it tries again for up to `seconds`.

    While the server has been silent for long, it tries nothing: `Notices` does.
    """

    def open_patiently() -> _Connection:
        until = time.monotonic() + seconds
        while True:
            if silence.is_long:
                raise _NoAnswerError("no answer")
            try:
                return open_one()
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            back_off()

    return open_patiently


def _prepare(open_one: Open) -> None:
    """Create the table `marks` if it is missing.

    Raise StartupError if the server's version is too old, or if the database's encoding isn't UTF8.
    """
    with open_one() as connection:
        if connection.info.server_version < _MIN_VERSION:
            raise StartupError("SMOLORA_DATABASE_URL: PostgreSQL 13 or newer is needed")
        row = connection.execute("SHOW server_encoding").fetchone()
        if row is None or row[0] != "UTF8":
            raise StartupError("SMOLORA_DATABASE_URL: the database's encoding must be UTF8: createdb -E UTF8")
        connection.is_bounded = False
        connection.execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [WRITERS_LOCK])
        row = connection.execute("SELECT to_regclass('marks')").fetchone()
        if row is None or row[0] is None:
            connection.execute(_MARKS)
        connection.execute(
            "DELETE FROM marks WHERE at < now() - interval '1 day'"
        )  # of connections closed long ago


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    cast("_Connection", connection.connection.dbapi_connection).is_bounded = not options.get("waits")
    if options.get("isolation_level") == "AUTOCOMMIT":
        return
    connection.info[NO_WRITERS_LOCK] = unlocked = options.get(NO_WRITERS_LOCK)
    if unlocked:
        if unlocked == LOSABLE:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
        return
    if options.get("waits"):
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})")


def _explain(context: sa.engine.ExceptionContext) -> None:
    """Replace psycopg's errors by the errors that callers handle."""
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
    """Return the driver's error that caused `error`, or `error` itself if there is none."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig
    return error.__cause__ or error


def _without_password(message: str, url: str) -> str:
    password = conninfo_to_dict(url).get("password")
    line = " ".join(message.split())
    return line.replace(str(password), "…") if password else line
