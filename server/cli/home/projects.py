"""`smolora projects`: list, limit and delete them. A running server knows of it at the next request.

What is slow to import is imported when needed.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from server.access.principal import OPERATOR
from server.cli.common import JsonOption, print_json, show, table_of
from server.cli.home.common import HomeOption, opened, opened_or_new, refusals, storage_beside
from server.cli.home.limits import BytesOption, JobsOption, RequestsOption, TokensOption, quota_of, told

if TYPE_CHECKING:
    from server.access.projects import Projects

group = typer.Typer(
    no_args_is_help=True,
    help="List, limit and delete projects. No server needs to run.",
)


@group.command("list")
def list_projects(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List projects by name, with their limits."""
    with opened(home, _projects) as projects:
        found = projects.list()
    if as_json:
        print_json({"projects": [project.to_document() for project in found]})
        return
    table = table_of("project", "created", "limits")
    for project in found:
        created = f"{project.created_at:%Y-%m-%d %H:%M}Z"
        table.add_row(Text(project.name), Text(created), Text(told(project.quota)))
    show(table)


@group.command()
def limit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="It is made if there is none.")],
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_jobs: JobsOption = None,
    max_bytes: BytesOption = None,
    home: HomeOption = None,
) -> None:
    """Set a project's limits, which hold for its keys together.

    They take the place of all that it had: what is left out has no limit.
    """
    with refusals(project="NAME"):
        quota = quota_of(requests_per_minute, tokens_per_minute, max_jobs, max_bytes)
        with opened_or_new(home, _projects) as projects:
            project = projects.put(name, quota, who=OPERATOR)
    typer.echo(f"{project.name}: {told(project.quota) or 'no limits'}")


@group.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")], home: HomeOption = None
) -> None:
    """Delete a project that has nothing left: no adapter, data set or file, and no job that hasn't ended.

    Its keys are revoked. Jobs that have ended, usage and audit entries stay.
    """
    from server.access.projects import Projects
    from server.training.project import refuse_with_uploads
    from server.training.queue.jobs import Jobs

    with refusals(), opened(home, lambda engine, _: engine) as engine:
        jobs, storage = Jobs(engine), storage_beside(engine, home)
        Projects(engine).delete(name, lambda: refuse_with_uploads(storage, jobs, name), who=OPERATOR)
    typer.echo(f"{name} is deleted, and its keys are revoked")


def _projects(engine: Any, _: object) -> "Projects":  # noqa: ANN401 SQLAlchemy's, which the database knows
    from server.access.projects import Projects

    return Projects(engine)
