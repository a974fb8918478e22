"""`smolora backup` and `smolora restore`: everything of a HOME in one file, and back.

What is slow to import is imported when needed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from server.cli.home.common import HomeOption, place_of, refuse_server, refuse_shared, say
from server.counted import counted
from server.loading import loading

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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def backup(file: FileArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Write everything of a HOME that can't be made again to one file, whether or not a server is running.

    It has the hashes of all keys, so nobody else can read it. Exit code 1 where stored bytes are damaged: they
    are in it as they are.
    """
    with loading():
        from server.backup.backup import back_up, stream

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


def restore(file: FileArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Fill an empty HOME from a backup, compared with its digests and checked as `doctor` does.

    Jobs that a worker had then go on from their checkpoints. Keys that were revoked since are valid again. Exit
    code 1 where stored bytes were damaged before the backup: they are restored as they were.
    """
    with loading():
        from server.backup import restore as restoring

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
