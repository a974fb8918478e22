"""`smolora doctor`: is everything under HOME as it should be, and what to do where it isn't.

Exit code 0: sound; 1: something was found, or couldn't be looked at. What is slow to import is imported when
needed.
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from server.cli.common import suggestion
from server.cli.home.common import HomeOption, refuse_server, storage_of
from server.loading import loading


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
        from server import doctor as practice

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
