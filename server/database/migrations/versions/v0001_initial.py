"""The tables of adapters, jobs and access.

On PostgreSQL, columns that are ordered or compared with "<" use the collation C, which compares bytes as SQLite
does. `rate_windows` exists on PostgreSQL alone: on SQLite one process counts requests in memory.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_QUOTAS = ("requests_per_minute", "tokens_per_minute", "max_jobs", "max_bytes")


def upgrade() -> None:
    _create_catalog()
    _create_jobs()
    _create_access()
    op.create_table(
        "bytes_place",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("place", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
    )


def _create_catalog() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", _bytewise(129), primary_key=True),
        sa.Column("project", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("is_public", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("latest", sa.Integer),
        sa.Column("rolled_back", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("next_version", sa.Integer, nullable=False),
    )
    op.create_index("ix_adapters_project_name", "adapters", ["project", "name"])
    op.create_table(
        "adapter_versions",
        sa.Column("name", _bytewise(129), sa.ForeignKey("adapters.name"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
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
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("base_digest", sa.String(64)),
        sa.Column("data_digest", sa.String(64)),
        sa.Column("config", sa.JSON, nullable=False, server_default="{}"),
        sa.Column("key_id", sa.String(64)),
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"])
    version = ["adapter_versions.name", "adapter_versions.version"]
    op.create_table(
        "adapter_aliases",
        sa.Column("name", _bytewise(129), primary_key=True),
        sa.Column("alias", _bytewise(64), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], version),
    )
    op.create_table(
        "composition_parts",
        sa.Column("name", _bytewise(129), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("part_name", _bytewise(129), nullable=False),
        sa.Column("part_version", sa.Integer, nullable=False),
        sa.Column("part_digest", sa.String(64), nullable=False),
        sa.Column("weight", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], version),
        sa.ForeignKeyConstraint(["part_name", "part_version"], version),
    )
    op.create_index("ix_composition_parts_part", "composition_parts", ["part_name", "part_version"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("project", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("key_id", sa.String(64)),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("adapter", sa.JSON),
        sa.Column("report", sa.JSON),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("idempotency_key", sa.String(320), unique=True),
        sa.Column("body_digest", sa.String(64)),
        sa.Column("owner", sa.String(255)),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.Float(53), nullable=False),
        sa.Column("timed_at", sa.Float(53)),
        sa.Column("run_seconds", sa.Float(53), nullable=False, server_default="0"),
        sa.Column("project_seconds", sa.Float(53)),
        sa.Column("wants_pause", sa.Boolean, nullable=False),
        sa.Column("gives_way", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("stalled_attempts", sa.Integer, nullable=False),
        sa.Column("crash", sa.Text),
        sa.Column("checkpoint_step", sa.Integer, nullable=False),
        sa.Column("metrics_step", sa.Integer, nullable=False),
        sa.Column("num_events", sa.Integer, nullable=False),
        sa.Column("files_removed_at", sa.DateTime(timezone=True)),
    )
    op.create_index("ix_jobs_status_number", "jobs", ["status", "number"])
    op.create_index("ix_jobs_project_number", "jobs", ["project", "number"])
    op.create_index("ix_jobs_project_seconds", "jobs", ["project", "project_seconds"])
    op.create_index("ix_jobs_seconds", "jobs", ["project_seconds"])
    op.create_table(
        "job_uses",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("used", sa.String(255), primary_key=True),
    )
    op.create_index("ix_job_uses_used", "job_uses", ["used"])
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )


def _create_access() -> None:
    op.create_table(
        "projects",
        sa.Column("name", _bytewise(64), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        *(sa.Column(name, sa.BigInteger) for name in _QUOTAS),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", _bytewise(64), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("secret_digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        *(sa.Column(name, sa.BigInteger) for name in _QUOTAS),
    )
    changes = op.create_table(
        "access_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
    )
    op.execute(sa.insert(changes).values(id=1, number=0))
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("project", _bytewise(64), primary_key=True),
        sa.Column("key_id", _bytewise(64), primary_key=True),
        sa.Column("adapter", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("trained_tokens", sa.BigInteger, nullable=False),
        sa.Column("job_seconds", sa.Float(53), nullable=False),
    )
    if op.get_context().dialect.name == "postgresql":
        op.create_table(
            "rate_windows",
            sa.Column("name", sa.String(160), primary_key=True),
            sa.Column("used", sa.BigInteger, nullable=False),
            sa.Column("most", sa.BigInteger, nullable=False),
            sa.Column("until", sa.Float(53), nullable=False),
        )


def _bytewise(length: int) -> "sa.String":
    """Return the type of a text that is compared byte by byte."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
