"""The catalog's tables, and transactions, which other packages with SQL use for their own tables, too.

A `name` in a table is a key, which includes the project (see `adapters.names`). The SQL works with SQLite and
PostgreSQL. The migrations in `server.migrations` create the tables.
"""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from adapters.errors import Interrupted, Unavailable
from adapters.names import DEFAULT_PROJECT, MAX_KEY, MAX_NAME

MAX_ATTEMPTS = 20
PATIENCE = "patience"
FAILURES = (OSError, DBAPIError, Unavailable)
"""Errors of a disk or a database. Clean-up after a completed change ignores them: a later clean-up does the rest.
"""


class _HasEngine(Protocol):
    _engine: sa.Engine


_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")
_Writer = TypeVar("_Writer", bound=_HasEngine)


def transact(engine: sa.Engine, work: Callable[[sa.Connection], _Result]) -> _Result:
    """Run `work` in one transaction, and again if another transaction took the same name or number first.

    If the connection is lost, retry for the seconds of the engine's execution option PATIENCE (default: 0).
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
            time.sleep(random.uniform(0.05, 0.2))


def transacted(
    method: Callable[Concatenate[_Writer, sa.Connection, _Given], _Result],
) -> Callable[Concatenate[_Writer, _Given], _Result]:
    """Decorate a method that takes a connection: run it in a transaction of its object's engine, by `transact`."""

    def run(self: _Writer, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        return transact(self._engine, lambda connection: method(self, connection, *given, **named))

    run.__name__, run.__doc__ = method.__name__, method.__doc__
    return run


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A time in UTC, also in databases that don't store time zones, such as SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData()

names = sa.Table(
    "adapters",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("project", sa.String(MAX_NAME), nullable=False, server_default=DEFAULT_PROJECT),  # as in the key
    sa.Column("is_public", sa.Boolean, nullable=False, server_default=sa.false()),  # usable by other projects
    sa.Column("kind", sa.String(16), nullable=False),  # "adapter" or "composition", of its versions
    sa.Column("latest", sa.Integer),  # null: all versions were deleted
    # `latest` was moved back manually, so that publishing by a job doesn't move it
    sa.Column("rolled_back", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("next_version", sa.Integer, nullable=False),  # outlives the versions: no number is used twice
    sa.Index("ix_adapters_project_name", "project", "name"),
)

versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), sa.ForeignKey("adapters.name"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("alpha", sa.Float(53), nullable=False),
    sa.Column("target_modules", sa.JSON, nullable=False),
    sa.Column("parameters", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("base_model", sa.Text),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("job_id", sa.String(64)),
    sa.Column("warnings", sa.JSON, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("base_digest", sa.String(64)),
    sa.Column("data_digest", sa.String(64)),
    sa.Column("config", sa.JSON, nullable=False, server_default="{}"),
    sa.Column(
        "key_id", sa.String(64)
    ),  # of the API key that published it; null: no key was needed, or it is unknown
)

parts = sa.Table(
    "composition_parts",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),  # 0, 1, … in the order of the expression
    sa.Column("part_name", sa.String(MAX_KEY), nullable=False),
    sa.Column("part_version", sa.Integer, nullable=False),
    sa.Column("part_digest", sa.String(64), nullable=False),  # the version's, which never changes
    sa.Column("weight", sa.Float(53), nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
    sa.ForeignKeyConstraint(["part_name", "part_version"], ["adapter_versions.name", "adapter_versions.version"]),
    sa.Index("ix_composition_parts_part", "part_name", "part_version"),
)

aliases = sa.Table(
    "adapter_aliases",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("alias", sa.String(MAX_NAME), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
)


def lock(connection: sa.Connection, name: str) -> None:
    """Keep other transactions from writing versions of `name` until the end of this one."""
    connection.execute(sa.select(names.c.name).where(names.c.name == name).with_for_update())
