"""The tables of API keys, projects, usage and the audit log. `server.database.migrations` creates them.

A transaction that changes a key or a project also increments the number in the table `changes`. A server reads
this number to find out whether its cache is current.
"""

import sqlalchemy as sa

from adapters.names import MAX_NAME
from adapters.sql import UtcDateTime

metadata = sa.MetaData()

MAX_ADDRESS = 64


_COUNTS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_jobs",
    "max_bytes",
    "max_versions",
    "max_job_seconds",
)


def _limits() -> "list[sa.Column[int] | sa.Column[bool]]":
    """Return a column for each field of `principal.Quota`. Null means no limit."""
    return [*(sa.Column(name, sa.BigInteger) for name in _COUNTS), sa.Column("allow_full", sa.Boolean)]


projects = sa.Table(
    "projects",
    metadata,
    sa.Column("name", sa.String(MAX_NAME), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_limits(),
    sa.Column("ceiling", sa.JSON(none_as_null=True)),  # the operator's limits, if a manager has set lower ones
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("project", sa.String(MAX_NAME), nullable=False),  # if the project is deleted, its keys stay, revoked
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("secret_digest", sa.String(64), nullable=False, unique=True),  # SHA-256 (hex)
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
    *_limits(),
)

changes = sa.Table(
    "access_changes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("number", sa.Integer, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("who", sa.String(64), nullable=False),  # as `audit.Entry.who`
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("project", sa.String(MAX_NAME), nullable=False),  # that `target` belongs to; "": unknown
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("address", sa.String(MAX_ADDRESS)),  # the client's; null if no request was made
    sa.Column("request_id", sa.String(128)),  # as in the answer's X-Request-Id
    sa.Index("ix_audit_project_number", "project", "number"),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),  # in UTC
    sa.Column("project", sa.String(MAX_NAME), primary_key=True),
    sa.Column("key_id", sa.String(64), primary_key=True),
    sa.Column("adapter", sa.Text, primary_key=True),  # an answer's adapters, joined by "+"; "base" for none
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("trained_tokens", sa.BigInteger, nullable=False),
    sa.Column("job_seconds", sa.Float(53), nullable=False),
)


def changed(connection: sa.Connection) -> None:
    """Increment the number in `changes`. Call this in every transaction that changes a key or a project."""
    connection.execute(sa.update(changes).values(number=changes.c.number + 1))
