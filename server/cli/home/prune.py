"""`smolora prune`: make room by removing what ended jobs left, on HOME itself, whether or not a server is running.

What is slow to import is imported when needed.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from server.cli.home.common import HomeOption, opened, storage_beside
from server.counted import counted
from server.loading import loading


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
        from server.training.queue.jobs import Jobs
        from server.training.queue.retention import Retention

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
