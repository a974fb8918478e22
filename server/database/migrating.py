"""Runs the migrations of `server.migrations`, on either database, one process at a time.

A database that lacks none is left as it is, and Alembic, which takes a tenth of a second, isn't imported.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from server.errors import StartupError
from server.migrations import versions

if TYPE_CHECKING:
    from alembic.config import Config

_LEAVING_SECONDS = 2.0  # for who was just told to stop, or copies the file


def migrate(engine: sa.Engine, *, is_alone: Callable[[], bool]) -> None:
    """Runs all missing migrations, in one transaction.

    That takes the lock of writers as it begins: of several processes that start at once, one migrates. Raises
    alembic's CommandError where the database was written by a newer smolora, and StartupError where it is an older
    one's and not `is_alone`, for all of `_LEAVING_SECONDS`: an older smolora that has it open would go on by what
    it knows.
    """
    if (schema := _schema(engine)) == newest_schema():
        return
    if schema is not None and knows_schema(schema):
        until = time.monotonic() + _LEAVING_SECONDS
        while not is_alone():
            if time.monotonic() > until:
                raise StartupError(
                    f"{engine.url.database} is of an older smolora, and a server, worker or command of that, or a "
                    "backup, has it open: stop all of them first"
                )
            time.sleep(0.1)
    from alembic import command

    config = _migrations()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def not_migrated() -> type[Exception]:
    """CommandError; for an `except`, which calls it once something was raised: nobody else imports Alembic."""
    from alembic.util import CommandError

    return CommandError


def newest_schema() -> str:
    """The last migration; `v0008_bytes_place.py` is 0008."""
    return max(path.name for path in Path(versions.__path__[0]).glob("v*.py"))[1:5]


def knows_schema(schema: str) -> bool:
    """Whether this smolora can bring a database of that schema up to date."""
    from alembic.script import ScriptDirectory

    return any(script.revision == schema for script in ScriptDirectory.from_config(_migrations()).walk_revisions())


def _schema(engine: sa.Engine) -> str | None:
    """None of a new database."""
    with engine.begin() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


def _migrations() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "server:migrations")
    return config
