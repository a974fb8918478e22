"""The catalog: names, versions and aliases of adapters."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("latest", sa.Integer),
        sa.Column("next_version", sa.Integer, nullable=False),
    )
    op.create_table(
        "adapter_versions",
        sa.Column("name", sa.String(64), sa.ForeignKey("adapters.name"), primary_key=True),
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
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"])
    op.create_table(
        "adapter_aliases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
    )


def downgrade() -> None:
    op.drop_table("adapter_aliases")
    op.drop_table("adapter_versions")
    op.drop_table("adapters")
