"""The lowest schema whose smolora may use this database: the previous version runs next to a newer schema."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    table = op.create_table(
        "schema_range",
        sa.Column("id", sa.Integer, primary_key=True),  # always 1
        sa.Column("lowest", sa.String(32), nullable=False),
    )
    op.bulk_insert(table, [{"id": 1, "lowest": "0002"}])
