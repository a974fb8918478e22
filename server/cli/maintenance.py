"""`smolora doctor`, `prune`, `backup`, `restore` and `move`: maintenance of a HOME.

`doctor`, `backup` and `restore` exit with code 1 if they find damage. Slow modules are imported when needed.
"""

import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import Commands, JsonOption, print_json, say, suggestion
from server.cli.home import (
    HomeOption,
    opened,
    place_of,
    refuse_server,
    refuse_shared,
    storage_for,
    storage_of,
)
from server.config import WorkerSettings, load
from server.errors import StartupError
from server.system.memory import exempt_from_gc
from server.system.messages import plural

if TYPE_CHECKING:
    from server.operations.move import Moved
    from server.storage.places import Storage

NewHomeOption = Annotated[
    Path | None, typer.Option(help="An empty or new folder. Default: SMOLORA_HOME, else ./data.")
]
FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A tar file, compressed if it ends in .gz or .tgz. -: stdout or stdin.",
        allow_dash=True,
    ),
]
_DASH = Path("-")
_INSTEAD = "use pg_dump and pg_restore, or snapshots, and copy HOME or the object store after the database"


def backup(file: FileArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Write everything of a HOME that can't be recreated to one file, whether or not a server is running.

    Only you can read the file, because it has the hashes of all keys. The exit code is 1 if stored bytes are
    damaged; the backup has them as they are.
    """
    with exempt_from_gc():
        from server.operations.backup import back_up, stream

    refuse_server("backup", _INSTEAD)
    refuse_shared("a backup of HOME has none of these bytes: back up the object store and the database")
    is_streamed, place = file == _DASH, place_of(home)
    made = stream(place, sys.stdout.buffer) if is_streamed else back_up(place, file.absolute())
    if as_json:
        print_json(asdict(made), err=is_streamed)
    else:
        jobs = f"{plural(made.num_jobs, 'job')} ({made.num_unended_jobs} not ended)"
        adapters = f"{plural(made.num_versions, 'version')}, {plural(made.num_adapters, 'stored adapter')}"
        uploads = plural(made.num_uploads, "upload")
        typer.echo(f"{file}: {adapters}, {jobs}, {uploads}; {plural(made.num_bytes, 'byte')}", err=is_streamed)
    for line in made.damaged:
        say(f"damaged before: {line}")
    if made.damaged:
        raise typer.Exit(1)


def restore(file: FileArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Fill an empty HOME from a backup, and check it against its digests and as `doctor` does.

    Running jobs continue from their checkpoints. Keys that were revoked after the backup are valid again. The exit
    code is 1 if stored bytes were damaged before the backup; they are restored as they were.
    """
    with exempt_from_gc():
        from server.operations import restore as restoring

    refuse_server("restore", _INSTEAD)
    refuse_shared("a backup is restored into a HOME: unset it")
    place = place_of(home)
    if file == _DASH:
        with open(sys.stdin.fileno(), "rb", closefd=False) as piped:
            done = restoring.restore_from(piped, place, "standard input")
    else:
        done = restoring.restore(file, place)
    found = done.diagnosis
    if as_json:
        print_json(asdict(done) | {"is_sound": found.is_sound})
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
            help="If the database is missing or damaged, rebuild it from the adapters' directories. "
            "Aliases, jobs, keys and limits are lost. Stop the server first.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the database and all stored adapters, data sets and files, and that the database lists what is stored.

    With SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL, check PostgreSQL and the object store. All its bytes are
    fetched. Servers may be running, except with --rebuild.
    """
    with exempt_from_gc():
        from server.operations import doctor as checks

    settings = load(WorkerSettings, home=home)
    url = settings.database
    if rebuild and url is not None and settings.bytes_url is None:  # before anything is created there
        raise StartupError(
            "--rebuild: with SMOLORA_DATABASE_URL and without SMOLORA_BYTES_URL, there are no records to rebuild "
            "from: restore a dump with pg_restore"
        )
    storage = storage_of(home) if url is None else _used_with(url, home, may_be_empty=rebuild)
    place, bucket = storage.home.path, storage.bucket
    rebuilt = checks.rebuild(place, bucket, url) if rebuild else None
    found = checks.examine(place, bucket, url)
    if as_json:
        print_json(asdict(found) | {"is_sound": found.is_sound, "rebuilt": asdict(rebuilt) if rebuilt else None})
    else:
        for line in rebuilt.lines() if rebuilt else ():
            typer.echo(line)
        if found.database is not None:
            typer.echo(f"database: {found.database}")
        for finding in found.findings:
            typer.echo(f"{finding.about}: {finding.message}")
        typer.echo(found.line())
        if url is None and any(finding.about == "database" for finding in found.findings):
            place_option = [] if home is None else ["--home", str(home)]
            typer.echo(
                f"{suggestion('doctor', '--rebuild', *place_option)} makes a new database from the directories"
            )
    if not found.is_sound:
        raise typer.Exit(1)


def _used_with(url: str, home: Path | None, *, may_be_empty: bool) -> "Storage":
    """Return the storage of the PostgreSQL database at `url`.

    Raise StartupError if the database belongs to another storage, or if it is unused, unless `may_be_empty`.
    """
    from server.database import refuse_unused

    if not may_be_empty:
        refuse_unused(url)
    with opened(home, lambda engine, _: storage_for(engine, home)) as storage:
        return storage


group = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Copy everything of a HOME to a cluster's database and object store, or back. Stop all servers and "
    "workers first. The source stays as it was.",
)


@group.command("to-cluster")
def move_to_cluster(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Fill the empty database of SMOLORA_DATABASE_URL and the empty place of SMOLORA_BYTES_URL from a HOME.

    If it is interrupted, run it again: no server starts there until it is done. Queued and paused jobs continue.
    """
    settings, url, storage = _cluster(home)
    from server.operations.move import to_cluster

    _report(to_cluster(settings.home.absolute(), url, storage), f"{settings.home} -> {storage.url}", as_json)


@group.command("to-home")
def move_to_home(home: NewHomeOption = None, as_json: JsonOption = False) -> None:
    """Fill an empty HOME from the database of SMOLORA_DATABASE_URL and the place of SMOLORA_BYTES_URL.

    If it is interrupted, nothing stays: run it again. Queued and paused jobs continue.
    """
    settings, url, storage = _cluster(home)
    from server.operations.move import to_home

    _report(to_home(settings.home.absolute(), url, storage), f"{storage.url} -> {settings.home}", as_json)


def _cluster(home: Path | None) -> tuple[WorkerSettings, str, "Storage"]:
    """Return the settings, the database's URL and the storage.

    Raise StartupError if SMOLORA_DATABASE_URL or SMOLORA_BYTES_URL isn't set.
    """
    from server.storage.places import Storage

    settings = load(WorkerSettings, home=home)
    if settings.database is None or settings.bytes_url is None:
        raise StartupError("set SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL: they say which cluster")
    return settings, settings.database, Storage.open(settings.home, settings)


def _report(moved: "Moved", way: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(moved))
        return
    for line in moved.damaged:
        typer.echo(f"damaged before: {line}")
    for job_id in moved.going_on:
        typer.echo(f"{job_id} goes on once there is a worker")
    adapters = f"{plural(moved.num_versions, 'version')}, {plural(moved.num_adapters, 'stored adapter')}"
    jobs = f"{plural(moved.num_jobs, 'job')} with files ({moved.num_unended_jobs} not ended)"
    more = f"{plural(moved.num_uploads, 'upload')}, {plural(moved.num_rows, 'row')} in all"
    typer.echo(f"{way}: {adapters}, {jobs}, {more}; compared, and the same on both sides")
    typer.echo(
        "the source is unchanged: once you have checked the copy, remove the source, or never serve it again"
    )


def prune(
    home: HomeOption = None,
    older_than: Annotated[
        float,
        typer.Option(
            envvar="SMOLORA_RETAIN_JOBS",
            min=0,
            max=36_500,
            metavar="DAYS",
            help="Only for jobs that ended this long ago. Default: SMOLORA_RETAIN_JOBS, else 0: all.",
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the rows, checkpoints, models and logs of jobs that have ended.

    Records, events, cards, adapters and data sets stay. Download models of full fine-tuning first.
    """
    with exempt_from_gc():
        from server.jobs.files import Retention
        from server.jobs.jobs import Jobs

    before = datetime.now(UTC) - timedelta(days=older_than)
    with opened(home, lambda engine, _: (Jobs(engine), storage_for(engine, home))) as (jobs_there, storage):
        removals = Retention(storage.home.path, jobs_there, storage.bucket).prune(before, dry_run)
    num_bytes = sum(removal.num_bytes for removal in removals)
    if as_json:
        jobs = [asdict(removal) for removal in removals]
        print_json({"dry_run": dry_run, "jobs": jobs, "num_bytes": num_bytes})
        return
    for removal in removals:
        typer.echo(f"{removal.job_id}: {plural(removal.num_bytes, 'byte')}")
    outcome = "would be removed" if dry_run else "removed"
    typer.echo(f"{plural(num_bytes, 'byte')} of {plural(len(removals), 'job')} {outcome}")
