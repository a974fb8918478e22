"""Roles, storage and audit: managers' limits, bytes of jobs, limits on versions, requests on the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("projects", sa.Column("ceiling", sa.JSON))
    op.add_column("audit", sa.Column("address", sa.String(64)))
    op.add_column("audit", sa.Column("request_id", sa.String(128)))
    op.create_index("ix_audit_project_number", "audit", ["project", "number"])
    op.add_column("jobs", sa.Column("bytes", sa.BigInteger))
    for table in ("projects", "api_keys"):
        op.add_column(table, sa.Column("max_versions", sa.BigInteger))
        op.add_column(table, sa.Column("max_job_seconds", sa.BigInteger))
        op.add_column(table, sa.Column("allow_full", sa.Boolean))
    _retire_deleted_projects()


def _retire_deleted_projects() -> None:
    """Rename the projects that were deleted, so that new projects of these names start empty."""
    existing = sa.select(sa.table("projects", sa.column("name")).c.name)
    for name in ("jobs", "api_keys", "usage", "audit"):
        table = sa.table(name, sa.column("project", sa.String), sa.column("idempotency_key"))
        project = table.c.project
        values: dict[str, object] = {"project": sa.func.substr(project, 1, 60) + "~old"}
        values |= {"idempotency_key": None} if name == "jobs" else {}
        is_gone = sa.and_(project.not_in(existing), project != "default")
        op.execute(sa.update(table).where(is_gone).values(values))
    adapters = sa.table("adapters", sa.column("project", sa.String), sa.column("latest"))
    is_gone = sa.and_(adapters.c.project.not_in(existing), adapters.c.project != "default")
    op.execute(sa.delete(adapters).where(adapters.c.latest.is_(None), is_gone))
