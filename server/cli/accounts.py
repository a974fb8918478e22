"""The limits of a key or a project as options, and in words.

`smolora keys`: make, list and revoke API keys. A running server knows of it at the next request.

A new key's secret is all that goes to standard output, for `KEY=$(smolora keys create ci)`. What is slow to import
is imported when needed.

`smolora projects`: list, limit and delete them. A running server knows of it at the next request.

What is slow to import is imported when needed.
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
from server.cli.common import JsonOption, print_json, show, table_of
from server.cli.home import HomeOption, opened, opened_or_new, refusals, say, storage_beside
from server.errors import StartupError
from server.system.program import counted

RequestsOption = Annotated[int | None, typer.Option(help="Requests other than GET. Default: no limit.")]
TokensOption = Annotated[
    int | None, typer.Option(help="Of prompts, and of answers as long as they may become. Default: no limit.")
]
JobsOption = Annotated[int | None, typer.Option(help="Jobs that haven't ended. Default: no limit.")]
BytesOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Stored adapters, data sets and files, such as 2GiB. Default: no limit."),
]

_BYTE_UNITS = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


def quota_of(
    requests_per_minute: int | None, tokens_per_minute: int | None, max_jobs: int | None, max_bytes: str | None
) -> Quota:
    """What the options say, within the bounds of POST /keys. Raises InvalidInput with the fields at fault."""
    from server.api.schemas import LimitFields

    num_bytes = None if max_bytes is None else _num_bytes(max_bytes)
    values = (requests_per_minute, tokens_per_minute, max_jobs, num_bytes)
    try:
        return LimitFields.model_validate(dict(zip(LIMITS, values, strict=True))).quota
    except ValidationError as error:
        message = "must be 1 or more, and below 2^53: leave it out for no limit"
        raise InvalidInput([FieldError(fault["loc"], message) for fault in error.errors()]) from None


def told(quota: Quota) -> str:
    """Those that there are: `60 requests a minute, 2GiB`."""
    parts = [
        _counted(quota.requests_per_minute, "request", " a minute"),
        _counted(quota.tokens_per_minute, "token", " a minute"),
        _counted(quota.max_jobs, "unfinished job"),
        "" if quota.max_bytes is None else _size(quota.max_bytes),
    ]
    return ", ".join(filter(None, parts))


def _num_bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        raise InvalidInput.of("max_bytes", "must be a size, such as 2GiB, or a number of bytes") from None


def _counted(limit: int | None, noun: str, per: str = "") -> str:
    return "" if limit is None else counted(limit, noun) + per


def _size(num_bytes: int) -> str:
    """In the largest unit that says it exactly, so that it may be given back."""
    for unit, size in _BYTE_UNITS.items():
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return counted(num_bytes, "byte")


if TYPE_CHECKING:
    from server.access.keys import ApiKey, Keys
    from server.storage.home import Home

_SPAN = re.compile(r"([0-9]{1,9})([dhm])")
_TIME_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
_EXPIRES = "must be a span, such as 90d, 12h or 30m, or a date or time, such as 2027-01-31 or 2027-01-31T12:00Z"

keys_group = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys. No server needs to run.")


@keys_group.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="For people, such as ci.")],
    project: Annotated[str, typer.Option(help="Whose; it comes to be if there is none.")] = DEFAULT_PROJECT,
    scopes: Annotated[
        str, typer.Option(help=f"What it may, with commas between: {', '.join(SCOPES)}.")
    ] = ",".join(DEFAULT_SCOPES),
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Such as 90d, 12h, 30m, or 2027-01-31 (UTC). Default: never."),
    ] = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_jobs: JobsOption = None,
    max_bytes: BytesOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print its secret, which can't be asked for again.

    From the first key on, a server on this HOME serves nobody without one.
    """
    with refusals(name="NAME", expires_at="--expires"):
        quota = quota_of(requests_per_minute, tokens_per_minute, max_jobs, max_bytes)
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
    if limits := told(key.quota):
        say(f"its limits: {limits}")
    if is_first:
        say("it is the first: from now on clients need a key, even with SMOLORA_ALLOW_ANONYMOUS=until-keyed")
    say("its secret is shown this once; clients send it as Authorization: Bearer …, commands as SMOLORA_API_KEY")


@keys_group.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only its keys.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, the oldest first; those that were revoked or have expired, too. Secrets are not stored."""
    with opened(home, _keys) as keys:
        found = keys.list(project)
    print_json({"keys": [key.to_document() for key in found]}) if as_json else show(_table(found))


@keys_group.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As listed.")], home: HomeOption = None
) -> None:
    """Revoke a key for good, at once: streams that it has open end, too. Its row stays."""
    from server.storage.reserve import Reserve

    with refusals(), opened(home, lambda *there: (_keys(*there), Reserve(there[1].path))) as (keys, reserve):
        key = reserve.spend_on(partial(keys.revoke, key_id, who=OPERATOR))
    typer.echo(f"{key.id} ({key.name}) of project {key.project} is revoked")


def _hand_over(as_json: bool, key: "ApiKey", secret: str) -> None:
    """Print it before the key is stored: nobody could use one whose secret is lost. Raises StartupError."""
    try:
        print_json(key.to_document() | {"secret": secret}) if as_json else typer.echo(secret)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still has of it
        reason = error.strerror or error
        raise StartupError(f"can't write the secret to standard output ({reason}): no key was made") from None


def _keys(engine: Any, home: "Home") -> "Keys":  # noqa: ANN401 SQLAlchemy's, which the database knows
    from server.access.keys import Keys

    return Keys(engine, home.keyed)


def _moment(text: str, now: datetime) -> datetime:
    """When a key expires, in UTC, which a time without an offset is taken to be in. Raises InvalidInput."""
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
        cells = (key.id, key.name, key.project, ", ".join(key.scopes), *times, state, told(key.quota))
        table.add_row(*map(Text, cells))
    return table


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}Z"


if TYPE_CHECKING:
    from server.access.projects import Projects

projects_group = typer.Typer(
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
        created = f"{project.created_at:%Y-%m-%d %H:%M}Z"
        table.add_row(Text(project.name), Text(created), Text(told(project.quota)))
    show(table)


@projects_group.command()
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


@projects_group.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")], home: HomeOption = None
) -> None:
    """Delete a project that has nothing left: no adapter, data set or file, and no job that hasn't ended.

    Its keys are revoked. Jobs that have ended, usage and audit entries stay.
    """
    from server.access.projects import Projects
    from server.jobs.jobs import Jobs, refuse_with_uploads

    with refusals(), opened(home, lambda engine, _: engine) as engine:
        jobs, storage = Jobs(engine), storage_beside(engine, home)
        Projects(engine).delete(name, lambda: refuse_with_uploads(storage, jobs, name), who=OPERATOR)
    typer.echo(f"{name} is deleted, and its keys are revoked")


def _projects(engine: Any, _: object) -> "Projects":  # noqa: ANN401 SQLAlchemy's, which the database knows
    from server.access.projects import Projects

    return Projects(engine)
