"""Projects share the workers by the time that they use, rather than by claims."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.drop_index("ix_jobs_project_claimed", "jobs")
    op.drop_column("jobs", "claimed_at")
    op.add_column("jobs", sa.Column("project_seconds", sa.Float(53)))
    op.add_column("jobs", sa.Column("gives_way", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("ix_jobs_project_seconds", "jobs", ["project", "project_seconds"])
    op.create_index("ix_jobs_seconds", "jobs", ["project_seconds"])


def downgrade() -> None:
    for index in ("ix_jobs_seconds", "ix_jobs_project_seconds"):
        op.drop_index(index, "jobs")
    for column in ("gives_way", "project_seconds"):
        op.drop_column("jobs", column)
    op.add_column("jobs", sa.Column("claimed_at", sa.Float(53)))
    op.create_index("ix_jobs_project_claimed", "jobs", ["project", "claimed_at"])
