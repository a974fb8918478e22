"""Whether `latest` was moved back by hand."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("adapters", sa.Column("rolled_back", sa.Boolean, nullable=False, server_default=sa.false()))
    newest = "SELECT max(version) FROM adapter_versions WHERE adapter_versions.name = adapters.name"
    op.execute(f"UPDATE adapters SET rolled_back = true WHERE latest < ({newest})")  # noqa: S608 no input


def downgrade() -> None:
    op.drop_column("adapters", "rolled_back")
