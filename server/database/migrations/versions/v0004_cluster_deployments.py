"""The last deployment of engine replicas, so that `smolora cluster deploy` changes only what its flags say."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "cluster_deployments",
        sa.Column("id", sa.Integer, primary_key=True),  # always 1
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("scale", sa.JSON, nullable=False),
    )
