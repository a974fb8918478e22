"""Transactions and column types for all tables: those of the adapters' catalog and those of the server.

All SQL is in the subset that SQLite and PostgreSQL share.
"""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from adapters.errors import Interrupted, Silent, Unavailable

MAX_ATTEMPTS = 20
PATIENCE = "patience"
"""An engine's execution option: the seconds for which an interrupted transaction is repeated."""
FAILURES = (OSError, DBAPIError, Unavailable)
"""The errors of a disk or a database. Cleanup after a completed write ignores them: the next cleanup retries."""


class _HasEngine(Protocol):
    _engine: sa.Engine


_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")
_Writer = TypeVar("_Writer", bound=_HasEngine)


class _Reader(sa.Connection):
    """A connection in autocommit mode, which repeats a read if its connection to the database is lost."""

    def execute(self, *given: Any, **named: Any) -> sa.CursorResult[Any]:  # noqa: ANN401 as SQLAlchemy's
        until = time.monotonic() + self.engine.get_execution_options().get(PATIENCE, 0.0)
        while True:
            try:
                return super().execute(*given, **named)
            except Interrupted as error:
                if not self.invalidated or isinstance(error, Silent) or time.monotonic() > until:
                    raise
                self.rollback()  # allows another connection
            back_off()


def reader_of(engine: sa.Engine) -> sa.Engine:
    """Return the engine in autocommit mode: single reads without a transaction don't wait for writers.

    A read whose connection to the database is lost is repeated, for as long as the engine's option PATIENCE says.
    """
    reader = engine.execution_options(isolation_level="AUTOCOMMIT")
    reader._connection_cls = _Reader
    return reader


def transact(engine: sa.Engine, work: Callable[[sa.Connection], _Result]) -> _Result:
    """Run `work` in one transaction, and return its result.

    If another transaction has inserted a row with the same key first, the transaction is repeated: there are up to
    MAX_ATTEMPTS attempts. If `work` or the commit raises Interrupted, the transaction is repeated for as long as
    the engine's option PATIENCE says, but not if it raises Silent.
    """
    until = time.monotonic() + engine.get_execution_options().get(PATIENCE, 0.0)
    num_left = MAX_ATTEMPTS
    while True:
        try:
            with engine.begin() as connection:
                return work(connection)
        except IntegrityError:
            num_left -= 1
            if not num_left:
                raise
        except Interrupted as error:
            if isinstance(error, Silent) or time.monotonic() > until:
                raise
            back_off()


def transacted(
    method: Callable[Concatenate[_Writer, sa.Connection, _Given], _Result],
) -> Callable[Concatenate[_Writer, _Given], _Result]:
    """Decorate a method: `transact` runs it, and passes a connection of `self._engine` as its first argument."""

    def run(self: _Writer, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        return transact(self._engine, lambda connection: method(self, connection, *given, **named))

    run.__name__, run.__doc__ = method.__name__, method.__doc__
    return run


def back_off() -> None:
    """Sleep for a random time before the next attempt, so that processes that collided don't collide again."""
    time.sleep(random.uniform(0.05, 0.2))


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A column type for times in UTC. It also works if the database drops time zones, as SQLite does."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
