"""`smolora jobs`: list training jobs; show, watch and steer one."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.viewpoint import DEFAULT_PROJECT
from server.cli.common import (
    Document,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    number,
    part_of,
    print_json,
    show,
    table_of,
)
from server.cli.train import watch


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="One job; all of them without it.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the job until it ends.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the job.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Have it wait until it is resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Let it go on.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the rows, checkpoints, model and log of one that has ended.")
    ] = False,
    status: Annotated[str | None, typer.Option(help="Only jobs that are queued, running, paused, …")] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List training jobs, the newest first; or show, watch and steer one."""
    moves = [name for name, is_set in (("cancel", cancel), ("pause", pause), ("resume", resume)) if is_set]
    if len(moves) + delete > 1 or ((moves or follow or delete) and job_id is None):
        raise typer.BadParameter("give a job, and one thing to do with it")
    with connected(url, api_key) as client:
        if job_id is None:
            found = client.jobs(status, limit)
            print_json({"jobs": found}) if as_json else show(_jobs_table(found))
            return
        if delete:
            client.remove_files(job_id)
            typer.echo(f"{job_id}: its rows, checkpoints, model and log are removed; its record stays", err=True)
        job = client.steer(job_id, moves[0]) if moves else client.job(job_id)
        if follow:
            raise typer.Exit(watch(client, job, as_json))
        print_json(job) if as_json else show(_jobs_table([job]))
        if not as_json and job["error"]:
            Console().print(Text(str(job["error"]), style="red"))


def _jobs_table(jobs: Sequence[Document]) -> Table:
    """Whose each is, too, unless all are of the project that is always there."""
    projects = [str(job.get("project", DEFAULT_PROJECT)) for job in jobs]  # an older server doesn't say
    tells_project = any(project != DEFAULT_PROJECT for project in projects)
    whose = ["project"] if tells_project else []
    table = table_of("job", *whose, "name", "status", "steps", "loss", "held out", "base's", "adapter")
    for project, job in zip(projects, jobs, strict=True):
        progress, metrics = part_of(job, "progress"), part_of(job, "metrics")
        status = str(job["status"])
        if job["position"] is not None:
            status += f" ({job['position']})"
        adapter = "" if job["adapter"] is None else "{name}@{version}".format(**part_of(job, "adapter"))
        table.add_row(
            Text(str(job["id"])),
            *([Text(project)] if tells_project else []),
            Text(str(job["name"])),
            Text("pausing" if job["pausing"] else status),
            f"{progress['step']}/{progress['total_steps']}",
            number(metrics["train_loss"]),
            number(metrics["eval_loss"]),
            number(metrics["base_eval_loss"]),
            Text(adapter),
        )
    return table
