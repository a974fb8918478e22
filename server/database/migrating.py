"""Run the migrations of `server.database.migrations` on SQLite or PostgreSQL, one process at a time.

Alembic takes a tenth of a second to import, so it is imported only if a migration is missing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from server import __version__
from server.errors import StartupError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
metadata = sa.MetaData()

ranges = sa.Table(
    "schema_range",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("lowest", sa.String(32), nullable=False),  # older versions can't use the database
)
_LEAVING_SECONDS = 2.0  # for processes that were just told to stop, and for a copy in progress


def migrate(engine: sa.Engine, *, is_alone: Callable[[], bool]) -> None:
    """Run all missing migrations in one transaction.

    The transaction takes the writers' lock first, so of several processes that start at once only one migrates.
    A newer schema is used as it is if it states that this version may use it (see `ranges`). Raise StartupError if
    it doesn't. Also raise it if the schema is older, and other processes still have the database open (`is_alone`
    returns False) after `_LEAVING_SECONDS`: they would keep writing to the old schema.
    """
    if (schema := _schema(engine)) == newest_schema():
        return
    if schema is not None:
        setting = "SMOLORA_HOME" if engine.url.database else "SMOLORA_DATABASE_URL"
        where = engine.url.database or setting
        if not knows_schema(schema):
            lowest = _lowest_schema(engine)
            if lowest is not None and newest_schema() >= lowest:
                return
            raise StartupError(
                f"{where}: the database has schema {schema}, which smolora {__version__} doesn't know: use the "
                f"version of smolora that wrote it, or give an empty {setting}"
            )
        until = time.monotonic() + _LEAVING_SECONDS
        while not is_alone():
            if time.monotonic() > until:
                raise StartupError(
                    f"{where} has an older schema, and a server, worker, command or backup of an older smolora "
                    "has it open: stop all of them first"
                )
            time.sleep(0.1)
    from alembic import command

    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def refuse_newer(engine: sa.Engine) -> None:
    """Raise StartupError if the database has a newer schema than this version's, whose rows it can't copy."""
    if (schema := _schema(engine)) != newest_schema():
        raise StartupError(
            f"the database has schema {schema}, which is newer than smolora {__version__}: use the version of "
            "smolora that wrote it"
        )


def newest_schema() -> str:
    """Return the schema's newest revision, for example "0001" if the newest file is `v0001_initial.py`."""
    return max(path.name for path in (MIGRATIONS / "versions").glob("v*.py"))[1:5]


def knows_schema(schema: str) -> bool:
    """Return whether this version can migrate a database from the schema's revision `schema` to the newest one."""
    from alembic.script import ScriptDirectory

    return any(script.revision == schema for script in ScriptDirectory.from_config(_config()).walk_revisions())


def _schema(engine: sa.Engine) -> str | None:
    """Return the revision of the database's schema, or None if the database is empty."""
    with engine.begin() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


def _lowest_schema(engine: sa.Engine) -> str | None:
    """Return the lowest revision whose smolora may use the database, or None if the database doesn't state it."""
    with engine.begin() as connection:
        if not sa.inspect(connection).has_table(ranges.name):
            return None
        return connection.execute(sa.select(ranges.c.lowest)).scalar_one_or_none()


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config
