"""The catalog's tables. The migrations in `server.database.migrations` create them.

A `name` in a table is a key, which includes the project (see `adapters.names`).
"""

import sqlalchemy as sa

from adapters.names import DEFAULT_PROJECT, MAX_KEY, MAX_NAME
from adapters.sql import UtcDateTime

metadata = sa.MetaData()

names = sa.Table(
    "adapters",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("project", sa.String(MAX_NAME), nullable=False, server_default=DEFAULT_PROJECT),  # as in the key
    sa.Column("is_public", sa.Boolean, nullable=False, server_default=sa.false()),  # usable by other projects
    sa.Column("kind", sa.String(16), nullable=False),  # of its versions: "adapter" or "composition"
    sa.Column("latest", sa.Integer),  # null: all versions were deleted
    # `latest` was moved back manually, so that publishing by a job doesn't move it
    sa.Column("rolled_back", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("next_version", sa.Integer, nullable=False),  # kept without versions: no number is used twice
    sa.Index("ix_adapters_project_name", "project", "name"),
)

versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), sa.ForeignKey("adapters.name"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),
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
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("base_digest", sa.String(64)),
    sa.Column("data_digest", sa.String(64)),
    sa.Column("config", sa.JSON, nullable=False, server_default="{}"),
    sa.Column(
        "key_id", sa.String(64)
    ),  # of the API key that published it; null: no key was needed, or it is unknown
)

parts = sa.Table(
    "composition_parts",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),  # 0, 1, … in the order of the expression
    sa.Column("part_name", sa.String(MAX_KEY), nullable=False),
    sa.Column("part_version", sa.Integer, nullable=False),
    sa.Column("part_digest", sa.String(64), nullable=False),  # a copy of the version's digest, which never changes
    sa.Column("weight", sa.Float(53), nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
    sa.ForeignKeyConstraint(["part_name", "part_version"], ["adapter_versions.name", "adapter_versions.version"]),
    sa.Index("ix_composition_parts_part", "part_name", "part_version"),
)

aliases = sa.Table(
    "adapter_aliases",
    metadata,
    sa.Column("name", sa.String(MAX_KEY), primary_key=True),
    sa.Column("alias", sa.String(MAX_NAME), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
)


def lock(connection: sa.Connection, name: str) -> None:
    """Keep other transactions from writing versions of `name` until this transaction ends."""
    connection.execute(sa.select(names.c.name).where(names.c.name == name).with_for_update())
