"""What several servers need of PostgreSQL: names in the order of their bytes, and rates counted together.

SQLite compares bytes anyway, and one process counts in memory.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_ORDERED = (  # columns that are compared with "<" or listed in order, and their lengths
    ("adapters", "name", 129),
    ("adapters", "project", 64),
    ("adapter_versions", "name", 129),
    ("adapter_aliases", "name", 129),
    ("adapter_aliases", "alias", 64),
    ("composition_parts", "name", 129),
    ("composition_parts", "part_name", 129),
    ("jobs", "project", 64),
    ("projects", "name", 64),
    ("api_keys", "id", 64),
    ("usage", "project", 64),
    ("usage", "key_id", 64),
)


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        return
    _collate("C")
    op.alter_column("usage", "adapter", type_=sa.Text(collation="C"))
    op.create_table(
        "rate_windows",
        sa.Column("name", sa.String(160), primary_key=True),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.Column("most", sa.BigInteger, nullable=False),
        sa.Column("until", sa.Float(53), nullable=False),
    )


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        return
    op.drop_table("rate_windows")
    op.alter_column("usage", "adapter", type_=sa.Text(collation="default"))
    _collate("default")


def _collate(collation: str) -> None:
    for table, column, length in _ORDERED:
        op.alter_column(table, column, type_=sa.String(length, collation=collation))
