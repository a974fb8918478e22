"""Rate limits that apply to all servers of one PostgreSQL database together; see `server.access.rates`.

A row counts what was used of one limit in its current window, a minute by the database's clock. Counting is a
short transaction in a thread, so the event loop doesn't wait. The transaction doesn't take the lock for which all
other writers wait. The response headers show the counts that this server read last.

While the database doesn't answer, each server counts on its own, for as long as `Outage` lets it use known keys.
So all servers together may then admit each limit once per server.
"""

import time
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import sqlalchemy as sa
from anyio import CapacityLimiter, to_thread
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningInsert

from adapters.errors import Unavailable
from adapters.sql import reader_of, transact
from server.access.principal import Principal
from server.access.rates import (
    KINDS,
    SMALL_STEP,
    Kind,
    Limit,
    MemoryRates,
    Window,
    headers_of,
    limits_of,
    refusal,
)
from server.database.clock import database_time
from server.database.opening import without_writers_lock
from server.database.silence import Outage

WINDOW_SECONDS = 60.0
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_NUM_THREADS = 8
_MAX_SEEN = 10_000

windows = sa.Table(
    "rate_windows",
    sa.MetaData(),
    sa.Column("name", sa.String(160), primary_key=True),
    sa.Column("used", sa.BigInteger, nullable=False),
    sa.Column("most", sa.BigInteger, nullable=False),  # the limit at the last request
    sa.Column("until", sa.Float(53), nullable=False),  # by `database_time`
)


class DatabaseRates:
    """Counts the requests and tokens of all servers together. Use it from one event loop."""

    def __init__(self, engine: sa.Engine, outage: Outage | None = None) -> None:
        self._outage = outage or Outage()
        self._own = MemoryRates()
        self._is_alone = False  # whether `_own` has the counts
        self._engine = without_writers_lock(engine, is_losable=True)
        self._reader = reader_of(engine)
        self._threads: CapacityLimiter | None = None
        self._seen: dict[str, Window] = {}

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """Count as `Rates.take` does. Raise Unavailable if the database can't be reached, and `outage` is over."""
        limits = limits_of(principal, kind)
        if not limits:
            return
        self._is_alone = self._may_count_alone
        try:
            is_taken = self._is_alone or await self._run(self._take, limits, amount)
        except Unavailable:
            self._is_alone = self._may_count_alone
            if not self._is_alone:
                raise
        if self._is_alone:
            await self._own.take(principal, kind, amount)
        elif not is_taken:
            every = [limit for each in KINDS for limit in limits_of(principal, each)]
            await self._run(self._look, every)
            short = min(limits, key=lambda limit: self._window(limit).remaining - min(amount, limit.most))
            refused = next((limit for limit in limits if amount > limit.most), short)
            raise refusal(refused, amount, self._window(refused), self.headers(principal))

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        """Count as `Rates.charge` does. Raise Unavailable as `take` does."""
        if limits := limits_of(principal, kind):
            if self._may_count_alone:
                await self._own.charge(principal, kind, amount)
            else:
                await self._run(self._charge, limits, amount)

    def headers(self, principal: Principal) -> dict[str, str]:
        return self._own.headers(principal) if self._is_alone else headers_of(principal, self._window)

    @property
    def _may_count_alone(self) -> bool:
        return self._outage.is_on and self._outage.is_survived

    async def _run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        if self._threads is None:
            self._threads = CapacityLimiter(_NUM_THREADS)
        return await to_thread.run_sync(work, *args, limiter=self._threads)

    def _window(self, limit: Limit) -> Window:
        found = self._seen.get(_name(limit))
        if found is None or not found.seconds_left:
            return Window(limit.most, time.time())
        return Window(min(found.remaining, limit.most), found.ends_at)

    def _take(self, limits: list[Limit], amount: int) -> bool:
        """Count `amount` against all limits, the key's before the project's. Return whether it was counted.

        If too little remains of any limit, nothing is counted.
        """
        if any(amount > limit.most for limit in limits):
            return False

        def work(connection: sa.Connection) -> bool:
            found = {_name(limit): connection.execute(_taken(limit, amount)).one_or_none() for limit in limits}
            for name, row in found.items():
                if row is None:
                    raise _TooLittleError
                self._remember(name, *row)
            return True

        try:
            return transact(self._engine, work)
        except _TooLittleError:
            return False

    def _charge(self, limits: list[Limit], amount: int) -> None:
        def work(connection: sa.Connection) -> None:
            for limit in limits:
                self._remember(_name(limit), *connection.execute(_taken(limit, amount, is_bounded=False)).one())

        transact(self._engine, work)

    def _look(self, limits: list[Limit]) -> None:
        query = sa.select(windows.c.name, windows.c.most - windows.c.used, windows.c.until - database_time())
        with self._reader.connect() as connection:
            found = connection.execute(query.where(windows.c.name.in_(list(map(_name, limits)))))
            for row in found:
                self._remember(*row)

    def _remember(self, name: str, remaining: int, seconds_left: float) -> None:
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen[name] = Window(max(0, remaining), time.time() + seconds_left)


class _TooLittleError(Exception):
    """Too little remains of a limit. Raised to roll the transaction back."""


def _taken(limit: Limit, amount: int, *, is_bounded: bool = True) -> "ReturningInsert[int, float]":
    """Return a statement that adds `amount` to the limit's window, or begins a new window if it has ended.

    The statement returns the remaining amount, and the seconds until the window ends. If `is_bounded` is true and
    too little remains, it counts nothing and returns no row.
    """
    now = database_time()
    new = insert(windows).values(name=_name(limit), used=amount, most=limit.most, until=now + WINDOW_SECONDS)
    is_to_come = windows.c.until > now + WINDOW_SECONDS + SMALL_STEP  # by a clock that was set back since
    has_ended = sa.or_(windows.c.until <= now, is_to_come)
    used = sa.case((has_ended, amount), else_=windows.c.used + amount)
    changed = new.on_conflict_do_update(
        index_elements=[windows.c.name],
        set_={
            "used": used,
            "most": limit.most,
            "until": sa.case((has_ended, now + WINDOW_SECONDS), else_=windows.c.until),
        },
        where=used <= limit.most if is_bounded else None,
    )
    return changed.returning(windows.c.most - windows.c.used, windows.c.until - now)


def _name(limit: Limit) -> str:
    return f"{limit.kind}/{limit.whose}/{limit.name}"
