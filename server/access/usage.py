"""The ledger: what each project, key and adapter used on each day.

A server sums the usage of answers in memory. Twice a second, it adds the sums to the ledger's rows in a single
transaction. On PostgreSQL this transaction doesn't wait for other writers, nor other writers for it. If the server
is killed, at most the usage of the last second is lost, and none is counted twice. The usage of a job is stored in
the transaction that ends the job.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import UTC, date, datetime
from functools import partial
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from adapters.errors import InDoubt, Unavailable
from adapters.sql import reader_of, transact
from server.access.projects import RETIRED
from server.access.tables import api_keys, usage
from server.database import without_writers_lock

FLUSH_SECONDS = 0.5

By = Literal["project", "key", "adapter", "day"]
BY: tuple[By, ...] = get_args(By)
_COLUMNS = {"project": usage.c.project, "key": usage.c.key_id, "adapter": usage.c.adapter, "day": usage.c.day}


@dataclass(frozen=True)
class Account:
    """The primary key of a row of the ledger: the use of an adapter by an API key on one day."""

    day: date  # in UTC
    project: str
    key_id: str
    adapter: str


@dataclass(frozen=True)
class Usage:
    """The sums in a row of the ledger. `prompt_tokens` includes the cached tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    job_seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, name) + getattr(other, name) for name in SUMS))


_KEY = tuple(field.name for field in fields(Account))
SUMS = tuple(field.name for field in fields(Usage))


def add_in(connection: sa.Connection, account: Account, sums: Usage) -> None:
    """Add the usage to the account's row, within the connection's transaction."""
    mine = sa.and_(*(usage.c[name] == value for name, value in asdict(account).items()))
    more = {name: usage.c[name] + value for name, value in asdict(sums).items()}
    if connection.execute(sa.update(usage).where(mine).values(more)).rowcount == 0:
        connection.execute(sa.insert(usage).values(asdict(account) | asdict(sums)))


def _upsert(connection: sa.Connection, more: Mapping[Account, Usage]) -> None:
    """Add usage to the accounts' rows by one statement, on PostgreSQL.

    The rows are written in the order of their keys, so that two transactions never wait for each other.
    """
    rows = [asdict(account) | asdict(more[account]) for account in sorted(more, key=astuple)]
    arrays = [_array(column, [row[column.name] for row in rows]) for column in usage.columns]
    given = sa.func.unnest(*arrays).table_valued(*(column.name for column in usage.columns)).render_derived()
    added = postgresql.insert(usage).from_select(list(given.columns.keys()), sa.select(given))
    sums = {name: usage.c[name] + added.excluded[name] for name in SUMS}
    connection.execute(added.on_conflict_do_update(index_elements=_KEY, set_=sums))


def _array(column: "sa.Column[object]", values: Sequence[object]) -> sa.ColumnElement[Sequence[object]]:
    """Return a parameter of the column's type, with a value for each row."""
    kind = postgresql.ARRAY(column.type)
    return sa.cast(sa.bindparam(None, values, kind), kind)


def _add_all(pending: Mapping[Account, Usage], connection: sa.Connection) -> None:
    """Add pending usage. That of a deleted project's key goes to the name under which its history is kept.

    Otherwise an answer that ended after the deletion would count for a new project of the same name.
    """
    mine = api_keys.c.id.in_({account.key_id for account in pending})
    # locked, so that a deletion of the project waits for this transaction, or the other way round
    keys = (
        sa.select(api_keys.c.id, api_keys.c.project).where(mine).order_by(api_keys.c.id).with_for_update(read=True)
    )
    projects = {row.id: row.project for row in connection.execute(keys) if RETIRED in row.project}
    found: dict[Account, Usage] = {}
    for account, sums in pending.items():
        where = replace(account, project=projects.get(account.key_id, account.project))
        found[where] = found.get(where, Usage()) + sums
    if connection.dialect.name == "postgresql":
        _upsert(connection, found)
        return
    for account, sums in found.items():
        add_in(connection, account, sums)


def _sum_of(column: "sa.Column[float]") -> "sa.Cast[float]":
    """Sum a column, and cast the sum to the column's type: PostgreSQL sums integers to decimals."""
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), column.type)


class Ledger:
    """The table that records usage: a row for each project, API key, adapter and day.

    Thread-safe; other processes may write the same table.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = without_writers_lock(engine)
        self._reader = reader_of(engine)
        self._pending: dict[Account, Usage] = {}
        self._lock = threading.Lock()

    def add(self, project: str, key_id: str, adapter: str, sums: Usage) -> None:
        """Add the usage of one answer to today's sums. The next `flush` stores it."""
        account = Account(datetime.now(UTC).date(), project, key_id, adapter)
        with self._lock:
            self._pending[account] = self._pending.get(account, Usage()) + sums

    def flush(self) -> None:
        """Store the usage added since the last flush. This blocks on the disk.

        If the flush fails, the next flush retries. But if InDoubt is raised, the sums may be stored already, so
        they are dropped rather than counted twice.
        """
        with self._lock:
            pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            transact(self._engine, partial(_add_all, pending))
        except InDoubt:
            raise
        except BaseException:
            with self._lock:
                for account, sums in pending.items():
                    self._pending[account] = self._pending.get(account, Usage()) + sums
            raise

    def try_to_flush(self) -> None:
        """Flush, but ignore a failure, since the next flush retries."""
        with suppress(DBAPIError, OSError, Unavailable):
            self.flush()

    def rows(
        self, first: date | None, last: date | None, by: Sequence[By], project: str | None = None
    ) -> list[dict[str, object]]:
        """Return the usage from the day `first` to the day `last`, inclusive, grouped by the columns `by`.

        None for a day means no bound. If `by` is empty, return one row. None for `project` means all projects.
        """
        columns = [_COLUMNS[name].label(name) for name in by]
        sums = [_sum_of(usage.c[name]).label(name) for name in SUMS]
        query = sa.select(*columns, *sums).group_by(*columns).order_by(*columns)
        if project is not None:
            query = query.where(usage.c.project == project)
        if first is not None:
            query = query.where(usage.c.day >= first)
        if last is not None:
            query = query.where(usage.c.day <= last)
        with self._reader.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]
