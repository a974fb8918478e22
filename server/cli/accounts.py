"""`smolora keys` and `smolora projects`: the API keys and projects of a HOME, and their limits.

No server needs to be running. A running server applies changes at its next request. `keys create` prints only the
secret on stdout, for `KEY=$(smolora keys create ci)`. Slow modules are imported when they are needed.
"""

import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from adapters.errors import FieldError, InvalidInput
from adapters.names import DEFAULT_PROJECT
from server.access.principal import DEFAULT_SCOPES, LIMITS, OPERATOR, SCOPES, Quota, Scope
from server.cli.common import Commands, JsonOption, print_json, say, show, table_of
from server.cli.home import HomeOption, opened, opened_or_new, refusals, storage_for
from server.errors import StartupError
from server.system.messages import plural

if TYPE_CHECKING:
    from server.access.keys import ApiKey, Keys
    from server.access.projects import Projects
    from server.storage.home import Home

_SPAN = re.compile(r"([0-9]{1,9})([dhm])")
_TIME_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
_EXPIRES = "must be a span, such as 90d, 12h or 30m, or a date or time, such as 2027-01-31 or 2027-01-31T12:00Z"
_BYTE_UNITS = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}

RequestsOption = Annotated[
    int | None, typer.Option(help="Requests other than GET, and downloads. Default: no limit.")
]
TokensOption = Annotated[
    int | None, typer.Option(help="Tokens of prompts, and the most that answers may have. Default: no limit.")
]
JobsOption = Annotated[int | None, typer.Option(help="Unfinished jobs. Default: no limit.")]
BytesOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Stored bytes, such as 2GiB. Default: no limit."),
]
VersionsOption = Annotated[
    int | None, typer.Option(help="Versions of adapters and compositions. Default: no limit.")
]
SecondsOption = Annotated[
    int | None, typer.Option(help="Seconds for which a job may run; then it fails. Default: no limit.")
]
FullOption = Annotated[
    bool | None, typer.Option("--allow-full/--no-full", help="Full fine-tuning. Default: allowed.")
]


def _quota(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_jobs: int | None,
    max_bytes: str | None,
    max_versions: int | None,
    max_job_seconds: int | None,
    allow_full: bool | None,
) -> Quota:
    """Return the limits that the options give. Raise InvalidInput if a value is invalid."""
    from server.api.schemas import LimitFields

    num_bytes = None if max_bytes is None else _num_bytes(max_bytes)
    counts = (requests_per_minute, tokens_per_minute, max_jobs, num_bytes, max_versions, max_job_seconds)
    values = (*counts, allow_full)
    try:
        return LimitFields.model_validate(dict(zip(LIMITS, values, strict=True))).quota
    except ValidationError as error:
        message = "must be 1 or more, and below 2^53: leave it out for no limit"
        raise InvalidInput([FieldError(fault["loc"], message) for fault in error.errors()]) from None


def _limits(quota: Quota) -> str:
    """Describe the limits that are set, as in `60 requests a minute, 2GiB`."""
    parts = [
        _counted(quota.requests_per_minute, "request", " a minute"),
        _counted(quota.tokens_per_minute, "token", " a minute"),
        _counted(quota.max_jobs, "unfinished job"),
        "" if quota.max_bytes is None else _size(quota.max_bytes),
        _counted(quota.max_versions, "version"),
        _counted(quota.max_job_seconds, "second", " a job"),
        "no full fine-tuning" if quota.allow_full is False else "",
    ]
    return ", ".join(filter(None, parts))


def _num_bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        raise InvalidInput.of("max_bytes", "must be a size, such as 2GiB, or a number of bytes") from None


def _counted(limit: int | None, noun: str, per: str = "") -> str:
    return "" if limit is None else plural(limit, noun) + per


def _size(num_bytes: int) -> str:
    """Format a size in the largest unit that is exact, so that it can be passed as an option."""
    for unit, size in _BYTE_UNITS.items():
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return plural(num_bytes, "byte")


keys_group = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Create, list and revoke API keys. No server needs to run."
)


@keys_group.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for people, such as ci.")],
    project: Annotated[str, typer.Option(help="The owning project; created if missing.")] = DEFAULT_PROJECT,
    scopes: Annotated[str, typer.Option(help=f"Comma-separated scopes: {', '.join(SCOPES)}.")] = ",".join(
        DEFAULT_SCOPES
    ),
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Such as 90d, 12h, 30m, or 2027-01-31 (UTC). Default: never."),
    ] = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_jobs: JobsOption = None,
    max_bytes: BytesOption = None,
    max_versions: VersionsOption = None,
    max_job_seconds: SecondsOption = None,
    allow_full: FullOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print its secret, which isn't stored.

    After the first key, a server on this HOME refuses clients without one.
    """
    with refusals(name="NAME", expires_at="--expires"):
        quota = _quota(
            requests_per_minute, tokens_per_minute, max_jobs, max_bytes, max_versions, max_job_seconds, allow_full
        )
        expires_at = None if expires is None else _moment(expires, datetime.now(UTC))
        with opened_or_new(home, _keys) as keys:
            is_first = not keys.are_there()
            key, _ = keys.create(
                name,
                who=OPERATOR,
                project=project,
                scopes=cast("Sequence[Scope]", [scope.strip() for scope in scopes.split(",")]),
                expires_at=expires_at,
                quota=quota,
                deliver=partial(_hand_over, as_json),
            )
    ends = "never expires" if key.expires_at is None else f"expires {_time(key.expires_at)}"
    say(f"{key.id} ({key.name}) of project {key.project} may {', '.join(key.scopes)}, and {ends}")
    if limits := _limits(key.quota):
        say(f"its limits: {limits}")
    if is_first:
        say("it is the first: from now on clients need a key, even with SMOLORA_ALLOW_ANONYMOUS=until-keyed")
    say("its secret is shown this once; clients send it as Authorization: Bearer …, commands as SMOLORA_API_KEY")


@keys_group.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only this project's keys.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, oldest first, with those that were revoked or have expired. Secrets aren't stored."""
    with opened(home, _keys) as keys:
        found = keys.list(project)
    print_json({"keys": [key.to_document() for key in found]}) if as_json else show(_table(found))


@keys_group.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `smolora keys list` shows it.")],
    home: HomeOption = None,
) -> None:
    """Revoke a key for good. Its open streams end at once. `keys list` still shows it."""
    from server.storage.reserve import Reserve

    with refusals(), opened(home, lambda *there: (_keys(*there), Reserve(there[1].path))) as (keys, reserve):
        key = reserve.spend_on(partial(keys.revoke, key_id, who=OPERATOR))
    typer.echo(f"{key.id} ({key.name}) of project {key.project} is revoked")


def _hand_over(as_json: bool, key: "ApiKey", secret: str) -> None:
    """Print a new key's secret. Raise StartupError if the secret can't be printed, so that no key is stored."""
    try:
        print_json(key.to_document() | {"secret": secret}) if as_json else typer.echo(secret)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what Python has buffered
        reason = error.strerror or error
        raise StartupError(f"can't write the secret to standard output ({reason}): no key was made") from None


def _keys(engine: Any, home: "Home") -> "Keys":  # noqa: ANN401 SQLAlchemy's, which the database knows
    from server.access.keys import Keys

    return Keys(engine, home.keyed)


def _moment(text: str, now: datetime) -> datetime:
    """Return the time of expiry in UTC. `text` is a span from `now`, or a date or time.

    A time without an offset is in UTC. Raise InvalidInput if `text` is malformed.
    """
    try:
        if span := _SPAN.fullmatch(text):
            return now + int(span[1]) * _TIME_UNITS[span[2]]
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInput.of("expires_at", _EXPIRES) from None


def _table(keys: Sequence["ApiKey"]) -> Table:
    now = datetime.now(UTC)
    table = table_of("key", "name", "project", "scopes", "created", "expires", "last used", "state", "limits")
    for key in keys:
        state = "revoked" if key.revoked_at is not None else "valid" if key.is_valid(now) else "expired"
        times = (_time(at) for at in (key.created_at, key.expires_at, key.last_used_at))
        cells = (key.id, key.name, key.project, ", ".join(key.scopes), *times, state, _limits(key.quota))
        table.add_row(*map(Text, cells))
    return table


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}Z"


projects_group = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="List, limit and delete projects. No server needs to run.",
)


@projects_group.command("list")
def list_projects(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List projects by name, with their limits."""
    with opened(home, _projects) as projects:
        found = projects.list()
    if as_json:
        print_json({"projects": [project.to_document() for project in found]})
        return
    table = table_of("project", "created", "limits")
    for project in found:
        table.add_row(*map(Text, (project.name, _time(project.created_at), _limits(project.quota))))
    show(table)


@projects_group.command()
def limit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The project; created if missing.")],
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_jobs: JobsOption = None,
    max_bytes: BytesOption = None,
    max_versions: VersionsOption = None,
    max_job_seconds: SecondsOption = None,
    allow_full: FullOption = None,
    home: HomeOption = None,
) -> None:
    """Set the limits of a project, which its keys share.

    They replace all earlier limits: an option that is left out means no limit.
    """
    with refusals(project="NAME"):
        quota = _quota(
            requests_per_minute, tokens_per_minute, max_jobs, max_bytes, max_versions, max_job_seconds, allow_full
        )
        with opened_or_new(home, _projects) as projects:
            project = projects.put(name, quota, who=OPERATOR)
    typer.echo(f"{project.name}: {_limits(project.quota) or 'no limits'}")


@projects_group.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `smolora projects list` shows it.")],
    home: HomeOption = None,
) -> None:
    """Delete a project. It must have no adapters, data sets, files or unfinished jobs.

    Its keys are revoked. Its finished jobs, usage and audit entries stay, under another name. A new project of
    this name starts empty.
    """
    from server.access.projects import Projects
    from server.jobs.jobs import Jobs, refuse_with_uploads, retire_jobs

    with refusals(), opened(home, lambda engine, _: engine) as engine:
        jobs, storage = Jobs(engine), storage_for(engine, home)
        refuse = partial(refuse_with_uploads, storage, jobs, name)
        history = Projects(engine).delete(name, refuse, retire_jobs, storage.records(), who=OPERATOR)
    typer.echo(f"{name} is deleted, and its keys are revoked; its history is kept as {history}")


def _projects(engine: Any, _: object) -> "Projects":  # noqa: ANN401 SQLAlchemy's, which the database knows
    from server.access.projects import Projects

    return Projects(engine)
