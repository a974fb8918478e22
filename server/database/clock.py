"""The database's clock, which all processes use, whatever their machines' clocks say."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from adapters.sql import UtcDateTime


class database_time(FunctionElement[float]):  # noqa: N801 as SQL functions are
    """Seconds since 1970 by the database's clock, at the moment at which SQL evaluates the expression.

    PostgreSQL's `now()` would be the time at which the transaction began.
    """

    type = sa.Float(53)
    inherit_cache = True


class database_now(FunctionElement[datetime]):  # noqa: N801 as SQL functions are
    """The current date and time in UTC, by the database's clock. SQLite's resolution is a millisecond."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(database_time)
def _postgresql_time(element: database_time, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401
    return "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_time, "sqlite")
def _sqlite_time(element: database_time, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now)
def _postgresql_now(element: database_now, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401
    return "clock_timestamp()"


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
