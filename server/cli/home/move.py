"""`smolora move`: a HOME into a cluster, and back.

What is slow to import is imported when needed.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import JsonOption
from server.cli.home.common import HomeOption
from server.config import WorkerSettings, load
from server.counted import counted
from server.errors import StartupError

if TYPE_CHECKING:
    from server.move.needs import Moved
    from server.storage import Storage

NewHomeOption = Annotated[
    Path | None, typer.Option(help="Empty, or not there yet. Default: SMOLORA_HOME, else ./data.")
]

group = typer.Typer(
    no_args_is_help=True,
    help="Everything of a HOME into a cluster's database and object store, and back. Nobody may be using either: "
    "stop servers and workers first. What it is moved from stays as it was.",
)


@group.command("to-cluster")
def move_to_cluster(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Fill the empty database of SMOLORA_DATABASE_URL and the empty place of SMOLORA_BYTES_URL from a HOME.

    If it is cut off, run it again: until it has ended no server starts there. Jobs that wait or are paused go on.
    """
    settings, url, storage = _cluster(home)
    from server.move.to_cluster import to_cluster

    _tell(to_cluster(settings.home.absolute(), url, storage), f"{settings.home} -> {storage.url}", as_json)


@group.command("to-home")
def move_to_home(home: NewHomeOption = None, as_json: JsonOption = False) -> None:
    """Fill an empty HOME from the database of SMOLORA_DATABASE_URL and the place of SMOLORA_BYTES_URL.

    If it is cut off nothing stays: run it again. Jobs that wait or are paused go on.
    """
    settings, url, storage = _cluster(home)
    from server.move.to_home import to_home

    _tell(to_home(settings.home.absolute(), url, storage), f"{storage.url} -> {settings.home}", as_json)


def _cluster(home: Path | None) -> tuple[WorkerSettings, str, "Storage"]:
    """The settings, the database's URL, and the bucket. Raises StartupError."""
    from server.storage import Storage

    settings = load(WorkerSettings, home=home)
    if settings.database is None or settings.bytes_url is None:
        raise StartupError("set SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL: they say which cluster")
    return settings, settings.database, Storage.open(settings.home, settings)


def _tell(moved: "Moved", way: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(moved)))
        return
    for line in moved.damaged:
        typer.echo(f"damaged before: {line}")
    for job_id in moved.going_on:
        typer.echo(f"{job_id} goes on once there is a worker")
    adapters = f"{counted(moved.num_versions, 'version')}, {counted(moved.num_adapters, 'stored adapter')}"
    jobs = f"{counted(moved.num_jobs, 'job')} with files ({moved.num_unended_jobs} not ended)"
    more = f"{counted(moved.num_uploads, 'upload')}, {counted(moved.num_rows, 'row')} in all"
    typer.echo(f"{way}: {adapters}, {jobs}, {more}; compared, and the same on both sides")
    typer.echo("what they were moved from is as it was: remove it, or never serve it again, once you have looked")
