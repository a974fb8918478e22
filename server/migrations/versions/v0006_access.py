"""Projects: whose each adapter and each job is. Keys, limits, usage and what operators did.

All that there was is the project `default`'s.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_NAMES = (  # which get room for a project before them; SQLite bounds no text
    ("adapters", "name"),
    ("adapter_versions", "name"),
    ("adapter_aliases", "name"),
    ("composition_parts", "name"),
    ("composition_parts", "part_name"),
)
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_jobs", "max_bytes")


def upgrade() -> None:
    if op.get_context().dialect.name != "sqlite":
        for table, column in _NAMES:
            op.alter_column(table, column, type_=sa.String(129))
        op.alter_column("jobs", "idempotency_key", type_=sa.String(320))
    op.add_column("adapters", sa.Column("project", sa.String(64), nullable=False, server_default="default"))
    op.add_column("adapters", sa.Column("is_public", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("ix_adapters_project_name", "adapters", ["project", "name"])
    op.add_column("adapter_versions", sa.Column("key_id", sa.String(64)))
    op.add_column("jobs", sa.Column("project", sa.String(64), nullable=False, server_default="default"))
    op.add_column("jobs", sa.Column("key_id", sa.String(64)))
    op.add_column("jobs", sa.Column("claimed_at", sa.Float(53)))
    op.add_column("jobs", sa.Column("timed_at", sa.Float(53)))
    op.add_column("jobs", sa.Column("run_seconds", sa.Float(53), nullable=False, server_default="0"))
    op.create_index("ix_jobs_project_number", "jobs", ["project", "number"])
    op.create_index("ix_jobs_project_claimed", "jobs", ["project", "claimed_at"])
    op.execute("UPDATE jobs SET idempotency_key = 'default/' || idempotency_key")
    op.create_table(
        "projects",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        *(sa.Column(name, sa.BigInteger) for name in _LIMITS),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("secret_digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        *(sa.Column(name, sa.BigInteger) for name in _LIMITS),
    )
    op.create_table(
        "access_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
    )
    op.execute("INSERT INTO access_changes (id, number) VALUES (1, 0)")
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
        sa.Column("project", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("adapter", sa.Text, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("trained_tokens", sa.BigInteger, nullable=False),
        sa.Column("job_seconds", sa.Float(53), nullable=False),
    )


def downgrade() -> None:
    for table in ("usage", "audit", "access_changes", "api_keys", "projects"):
        op.drop_table(table)
    op.execute("UPDATE jobs SET idempotency_key = substr(idempotency_key, 9)")
    for index in ("ix_jobs_project_claimed", "ix_jobs_project_number"):
        op.drop_index(index, "jobs")
    for column in ("run_seconds", "timed_at", "claimed_at", "key_id", "project"):
        op.drop_column("jobs", column)
    op.drop_column("adapter_versions", "key_id")
    op.drop_index("ix_adapters_project_name", "adapters")
    for column in ("is_public", "project"):
        op.drop_column("adapters", column)
