"""Transactions and column types for all tables: those of the adapters' catalog and those of the server.

All SQL is in the subset that SQLite and PostgreSQL share.
"""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from adapters.errors import Interrupted, Unavailable

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


def reader_of(engine: sa.Engine) -> sa.Engine:
    """Return the engine in autocommit mode: single reads without a transaction don't wait for writers."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def transact(engine: sa.Engine, work: Callable[[sa.Connection], _Result]) -> _Result:
    """Run `work` in one transaction, and return its result.

    If another transaction has inserted a row with the same key first, the transaction is repeated: there are up to
    MAX_ATTEMPTS attempts. If `work` or the commit raises Interrupted, the transaction is repeated for as long as
    the engine's option PATIENCE says.
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
        except Interrupted:
            if time.monotonic() > until:
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
