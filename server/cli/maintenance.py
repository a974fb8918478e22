"""`smolora backup` and `smolora restore`: everything of a HOME in one file, and back.

What is slow to import is imported when needed.

`smolora doctor`: is everything under HOME as it should be, and what to do where it isn't.

Exit code 0: sound; 1: something was found, or couldn't be looked at. What is slow to import is imported when
needed.

`smolora move`: a HOME into a cluster, and back.

What is slow to import is imported when needed.

`smolora prune`: make room by removing what ended jobs left, on HOME itself, whether or not a server is running.

What is slow to import is imported when needed.
"""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import JsonOption, suggestion
from server.cli.home import (
    HomeOption,
    opened,
    place_of,
    refuse_server,
    refuse_shared,
    say,
    storage_beside,
    storage_of,
)
from server.config import WorkerSettings, load
from server.errors import StartupError
from server.system.memory import loading
from server.system.program import counted

FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A tar; .gz and .tgz are compressed. -: standard output, or input.",
        allow_dash=True,
    ),
]
_DASH = Path("-")
_INSTEAD = (
    "pg_dump and pg_restore, or snapshots, are for that one, and HOME or the object store is copied after it"
)
BackupJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def backup(file: FileArgument, home: HomeOption = None, as_json: BackupJsonOption = False) -> None:
    """Write everything of a HOME that can't be made again to one file, whether or not a server is running.

    It has the hashes of all keys, so nobody else can read it. Exit code 1 where stored bytes are damaged: they
    are in it as they are.
    """
    with loading():
        from server.operations.backup import back_up, stream

    refuse_server("backup", _INSTEAD)
    refuse_shared("a backup of HOME has none of it: keep versions in the object store, and back the database up")
    is_streamed, place = file == _DASH, place_of(home)
    made = stream(place, sys.stdout.buffer) if is_streamed else back_up(place, file.absolute())
    if as_json:
        typer.echo(json.dumps(asdict(made)), err=is_streamed)
    else:
        jobs = f"{counted(made.num_jobs, 'job')} ({made.num_unended_jobs} not ended)"
        adapters = f"{counted(made.num_versions, 'version')}, {counted(made.num_adapters, 'stored adapter')}"
        uploads = counted(made.num_uploads, "upload")
        typer.echo(f"{file}: {adapters}, {jobs}, {uploads}; {counted(made.num_bytes, 'byte')}", err=is_streamed)
    for line in made.damaged:
        say(f"damaged before: {line}")
    if made.damaged:
        raise typer.Exit(1)


def restore(file: FileArgument, home: HomeOption = None, as_json: BackupJsonOption = False) -> None:
    """Fill an empty HOME from a backup, compared with its digests and checked as `doctor` does.

    Jobs that a worker had then go on from their checkpoints. Keys that were revoked since are valid again. Exit
    code 1 where stored bytes were damaged before the backup: they are restored as they were.
    """
    with loading():
        from server.operations import restore as restoring

    refuse_server("restore", _INSTEAD)
    refuse_shared("a backup is restored into a HOME that has everything: unset it")
    place = place_of(home)
    if file == _DASH:
        with open(sys.stdin.fileno(), "rb", closefd=False) as piped:
            done = restoring.restore_from(piped, place, "standard input")
    else:
        done = restoring.restore(file, place)
    found = done.diagnosis
    if as_json:
        typer.echo(json.dumps(asdict(done) | {"is_sound": found.is_sound}))
    else:
        for finding in found.findings:
            typer.echo(f"{finding.about}: {finding.message}")
        for job_id in done.going_on:
            typer.echo(f"{job_id} goes on once there is a worker")
        typer.echo(f"{place} is as it was at {done.header.created_at}; {found.line()}")
    if not found.is_sound:
        raise typer.Exit(1)


def doctor(
    home: HomeOption = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Where the database is missing or damaged, make it anew from the adapters' directories. "
            "Aliases, jobs, keys and limits are lost then. Stop the server first.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check the digests of all stored adapters, data sets and files, the database, and that neither it nor the
    adapters' directories have what the other lacks.

    Of what is in an object store (SMOLORA_BYTES_URL), every byte is fetched.
    """
    with loading():
        from server.operations import doctor as practice

    refuse_server("doctor", "pg_amcheck looks at that one")
    storage = storage_of(home)
    place, bucket = storage.home.path, storage.bucket
    rebuilt = practice.rebuild(place, bucket) if rebuild else None
    found = practice.examine(place, bucket)
    if as_json:
        document = asdict(found) | {"is_sound": found.is_sound, "rebuilt": asdict(rebuilt) if rebuilt else None}
        typer.echo(json.dumps(document))
    else:
        for line in rebuilt.lines() if rebuilt else ():
            typer.echo(line)
        if found.database is not None:
            typer.echo(f"database: {found.database}")
        for finding in found.findings:
            typer.echo(f"{finding.about}: {finding.message}")
        typer.echo(found.line())
        if any(finding.about == "database" for finding in found.findings):
            given = [] if home is None else ["--home", str(home)]
            typer.echo(f"{suggestion('doctor', '--rebuild', *given)} makes a new database from the directories")
    if not found.is_sound:
        raise typer.Exit(1)


if TYPE_CHECKING:
    from server.operations.move import Moved
    from server.storage.places import Storage

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
    from server.operations.move import to_cluster

    _tell(to_cluster(settings.home.absolute(), url, storage), f"{settings.home} -> {storage.url}", as_json)


@group.command("to-home")
def move_to_home(home: NewHomeOption = None, as_json: JsonOption = False) -> None:
    """Fill an empty HOME from the database of SMOLORA_DATABASE_URL and the place of SMOLORA_BYTES_URL.

    If it is cut off nothing stays: run it again. Jobs that wait or are paused go on.
    """
    settings, url, storage = _cluster(home)
    from server.operations.move import to_home

    _tell(to_home(settings.home.absolute(), url, storage), f"{storage.url} -> {settings.home}", as_json)


def _cluster(home: Path | None) -> tuple[WorkerSettings, str, "Storage"]:
    """The settings, the database's URL, and the bucket. Raises StartupError."""
    from server.storage.places import Storage

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


def prune(
    home: HomeOption = None,
    older_than: Annotated[
        float,
        typer.Option(
            envvar="SMOLORA_RETAIN_JOBS",
            min=0,
            max=36_500,
            metavar="DAYS",
            help="Only of jobs that ended so long ago. Default: SMOLORA_RETAIN_JOBS, else 0: of all.",
        ),
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Remove the rows, checkpoints, models and logs of jobs that have ended.

    Their records, events and cards stay, as do all versions of adapters, and data sets. Models of full fine-tuning
    go: download them first.
    """
    with loading():
        from server.jobs.files import Retention
        from server.jobs.jobs import Jobs

    before = datetime.now(UTC) - timedelta(days=older_than)
    with opened(home, lambda engine, _: (Jobs(engine), storage_beside(engine, home))) as (jobs_there, storage):
        removals = Retention(storage.home.path, jobs_there, storage.bucket).prune(before, dry_run)
    num_bytes = sum(removal.num_bytes for removal in removals)
    if as_json:
        jobs = [asdict(removal) for removal in removals]
        typer.echo(json.dumps({"dry_run": dry_run, "jobs": jobs, "num_bytes": num_bytes}))
        return
    for removal in removals:
        typer.echo(f"{removal.job_id}: {counted(removal.num_bytes, 'byte')}")
    outcome = "would be removed" if dry_run else "removed"
    typer.echo(f"{counted(num_bytes, 'byte')} of {counted(len(removals), 'job')} {outcome}")
