"""Runs the migrations of `server.migrations`, on either database, one process at a time."""

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory


def migrate(engine: sa.Engine) -> None:
    """Runs all missing migrations, in one transaction.

    That takes the lock of writers as it begins: of several processes that start at once, one migrates. Raises
    alembic's CommandError where the database was written by a newer smolora.
    """
    config = _migrations()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def knows_schema(schema: str) -> bool:
    """Whether this smolora can bring a database of that schema up to date."""
    return any(script.revision == schema for script in ScriptDirectory.from_config(_migrations()).walk_revisions())


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", "server:migrations")
    return config
