"""Where the bytes are that the rows name: servers that share a database must share those, too."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "bytes_place",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("place", sa.String(64), nullable=False),
        sa.Column("told", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("bytes_place")
