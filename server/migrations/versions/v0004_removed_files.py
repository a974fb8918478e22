"""When the files of an ended job were removed."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("files_removed_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("jobs", "files_removed_at")
