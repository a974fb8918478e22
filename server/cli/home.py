"""Find HOME (a server's data folder), open its database and report errors, for commands that need no server.

Slow modules are imported when they are needed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from adapters.errors import Conflict, InvalidInput, NotFound
from server.cli.common import advised, fail, say
from server.config import WorkerSettings, load
from server.errors import StartupError

if TYPE_CHECKING:
    from server.storage.places import Storage

HomeOption = Annotated[Path | None, typer.Option(help="The server's HOME. Default: SMOLORA_HOME, else ./data.")]

Built = TypeVar("Built")


def place_of(home: Path | None) -> Path:
    """Return the path of HOME: `home` or, if that is None, SMOLORA_HOME or its default.

    Raise StartupError if a setting is invalid.
    """
    return load(WorkerSettings, home=home).home


def storage_of(home: Path | None) -> "Storage":
    """Return the storage: HOME, and the bucket if one is set. Raise StartupError if the bucket is unreachable."""
    from server.storage.places import Storage

    settings = load(WorkerSettings, home=home)
    return Storage.open(settings.home, settings)


def storage_for(engine: Any, home: Path | None) -> "Storage":  # noqa: ANN401  # SQLAlchemy's
    """Return the storage for an open database. Raise StartupError if the database belongs to another storage."""
    from server.database import agree

    storage = storage_of(home)
    agree(engine, storage.place)
    return storage


def refuse_shared(why: str) -> None:
    """Raise StartupError, with the reason `why`, if SMOLORA_BYTES_URL is set."""
    if load(WorkerSettings).bytes_url is not None:
        raise StartupError(f"SMOLORA_BYTES_URL: {why}")


def refuse_server(command: str, instead: str) -> None:
    """Raise StartupError if the database is in PostgreSQL: `command` is only for a database in HOME.

    The message ends with `instead`, which says what to do instead.
    """
    if load(WorkerSettings).database is not None:
        raise StartupError(f"{command} is for a database in HOME, and SMOLORA_DATABASE_URL is set: {instead}")


def refuse_unmade(settings: WorkerSettings) -> None:
    """Raise StartupError if HOME is the default ./data, and no server has made it.

    Probably the user forgot to name the server's HOME. In a new one, a key would protect nothing, and a worker
    would wait forever.
    """
    from server.database import existing

    if settings.database is None and "home" not in settings.model_fields_set:
        existing(settings.home.absolute())


@contextmanager
def opened(home: Path | None, build: Callable[..., Built]) -> Iterator[Built]:
    """Open the database of an existing HOME, and yield the result of `build(database, home)`.

    Raise StartupError if there is no such HOME.
    """
    from server.database import existing

    settings = load(WorkerSettings, home=home)
    if settings.database is None:
        existing(settings.home)
    with _database(settings, build) as built:
        yield built


@contextmanager
def opened_or_new(home: Path | None, build: Callable[..., Built]) -> Iterator[Built]:
    """Work like `opened`, but create HOME if it is missing. Print on stderr which HOME is used.

    Raise StartupError instead if HOME is missing and only its default names it.
    """
    from server.database import FILE_NAME

    settings = load(WorkerSettings, home=home)
    refuse_unmade(settings)
    is_new = settings.database is None and not (settings.home / FILE_NAME).exists()
    with _database(settings, build) as built:
        yield built
    if settings.database is None:
        say(f"{'made a home in' if is_new else 'at work in'} {settings.home.absolute()}")
    else:
        say("at work in the database of SMOLORA_DATABASE_URL")


@contextmanager
def refusals(**options: str) -> Iterator[None]:
    """Exit with a line on stderr if the block raises InvalidInput, NotFound or Conflict.

    Invalid fields are reported as options. By default, the field `max_jobs` is the option --max-jobs; `options`
    maps fields to other options.
    """
    try:
        yield
    except InvalidInput as error:
        faults = ((str(fault.loc[-1]), fault.message) for fault in error.errors)
        lines = (f"{options.get(name, '--' + name.replace('_', '-'))}: {message}" for name, message in faults)
        fail("; ".join(lines))
    except (NotFound, Conflict) as error:
        fail(advised(error))


@contextmanager
def _database(settings: WorkerSettings, build: Callable[..., Built]) -> Iterator[Built]:
    from server.database import as_startup_error
    from server.storage.home import Home

    engine = _connected(settings)
    try:
        with as_startup_error(settings.home):
            yield build(engine, Home(settings.home))
    finally:
        engine.dispose()


def _connected(settings: WorkerSettings) -> Any:  # noqa: ANN401 SQLAlchemy's
    """Connect to the database.

    On a full disk, delete the file that reserves space (`server.storage.reserve`) and try again, since SQLite
    needs room to open its file.
    """
    from server.database import connect
    from server.storage.reserve import Reserve

    try:
        return connect(settings.home, url=settings.database)
    except StartupError:
        reserve = Reserve(settings.home)
        if settings.database is not None or not settings.home.is_dir() or not reserve.is_needed:
            raise
        reserve.release()
        return connect(settings.home)
