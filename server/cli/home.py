"""What the commands on HOME have in common: where it is, its database, and how they say what they refuse.

What is slow to import is imported when needed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from adapters.errors import Conflict, InvalidInput, NotFound
from server.cli.common import in_own_terms
from server.config import WorkerSettings, load
from server.errors import StartupError

if TYPE_CHECKING:
    from server.storage.places import Storage

HomeOption = Annotated[Path | None, typer.Option(help="The server's. Default: SMOLORA_HOME, else ./data.")]

Built = TypeVar("Built")


def place_of(home: Path | None) -> Path:
    """HOME, as the settings have it. Raises StartupError on what is no setting."""
    return load(WorkerSettings, home=home).home


def storage_of(home: Path | None) -> "Storage":
    """HOME and the bucket, if the settings have one. Raises StartupError, also where that can't be reached."""
    from server.storage.places import Storage

    settings = load(WorkerSettings, home=home)
    return Storage.open(settings.home, settings)


def storage_beside(engine: Any, home: Path | None) -> "Storage":  # noqa: ANN401 SQLAlchemy's, as in `projects.py`
    """The same of an open database; StartupError where its rows name bytes that are elsewhere."""
    from server.database import agree

    storage = storage_of(home)
    agree(engine, storage.place)
    return storage


def refuse_shared(why: str) -> None:
    """Raises StartupError where the bytes are in an object store."""
    if load(WorkerSettings).bytes_url is not None:
        raise StartupError(f"SMOLORA_BYTES_URL: {why}")


def refuse_server(command: str, instead: str) -> None:
    """Raise StartupError where the database is a PostgreSQL server's, and the command is for the file in HOME."""
    if load(WorkerSettings).database is not None:
        raise StartupError(f"{command} is for a database in HOME, and SMOLORA_DATABASE_URL is set: {instead}")


@contextmanager
def opened(home: Path | None, build: Callable[..., Built]) -> Iterator[Built]:
    """What `build` makes of the database and the folders of a HOME that is there already.

    Raises StartupError where none is.
    """
    from server.database import existing

    settings = load(WorkerSettings, home=home)
    if settings.database is None:
        existing(settings.home)
    with _database(settings, build) as built:
        yield built


@contextmanager
def opened_or_new(home: Path | None, build: Callable[..., Built]) -> Iterator[Built]:
    """The same of a HOME that is made if need be, as `serve` does; which it is, is said on stderr."""
    from server.database import FILE_NAME

    settings = load(WorkerSettings, home=home)
    is_new = settings.database is None and not (settings.home / FILE_NAME).exists()
    with _database(settings, build) as built:
        yield built
    if settings.database is None:
        say(f"{'made a home in' if is_new else 'at work in'} {settings.home.absolute()}")
    else:
        say("at work in the database of SMOLORA_DATABASE_URL")


@contextmanager
def refusals(**options: str) -> Iterator[None]:
    """A block in which whatever is refused ends the command with a line on stderr, and exit code 1.

    A field at fault is called as its option, which `options` gives where its name alone doesn't.
    """
    try:
        yield
    except InvalidInput as error:
        faults = ((str(fault.loc[-1]), fault.message) for fault in error.errors)
        told = (f"{options.get(name, '--' + name.replace('_', '-'))}: {message}" for name, message in faults)
        say("; ".join(told))
        raise typer.Exit(1) from None
    except (NotFound, Conflict) as error:
        say(in_own_terms(str(error)))
        raise typer.Exit(1) from None


def say(line: str) -> None:
    """On standard error, where no script takes it for what it asked for."""
    typer.echo(f"smolora: {line}", err=True)


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
    """On a full disk by what the reserve has: SQLite needs some room to open the file, if nobody has it open."""
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
