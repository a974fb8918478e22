"""Compositions and their parts; where each version comes from."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("base_digest", sa.String(64)))
    op.add_column("adapter_versions", sa.Column("data_digest", sa.String(64)))
    op.add_column("adapter_versions", sa.Column("config", sa.JSON, nullable=False, server_default="{}"))
    op.create_table(
        "composition_parts",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("part_name", sa.String(64), nullable=False),
        sa.Column("part_version", sa.Integer, nullable=False),
        sa.Column("part_digest", sa.String(64), nullable=False),
        sa.Column("weight", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
        sa.ForeignKeyConstraint(
            ["part_name", "part_version"], ["adapter_versions.name", "adapter_versions.version"]
        ),
    )
    op.create_index("ix_composition_parts_part", "composition_parts", ["part_name", "part_version"])


def downgrade() -> None:
    op.drop_table("composition_parts")
    for column in ("config", "data_digest", "base_digest"):
        op.drop_column("adapter_versions", column)
