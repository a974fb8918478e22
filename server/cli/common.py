"""Flags made of the settings' fields, which only `server.config` spells; hints for PEFT's and TRL's options.

What the commands that speak to a running server have in common: options, the connection, tables.

Each works against any URL, with a key, and prints JSON for scripts with --json. What the server refuses is a line
or several on stderr, and exit code 1. What is slow to import is imported when needed.
"""

import codecs
import inspect
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from adapters.errors import SmoloraError
from server.config import Flag, SettingsT, WorkerSettings, described, load, server_url
from server.config.environment import log_format
from server.errors import StartupError
from server.system.program import program
from server.telemetry import logs


class PeersOptions(TyperCommand):
    """A command that names its own option if it is given PEFT's or TRL's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # its type is private to Typer
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # its class is private to Typer, too
            from server.api.near_names import peers_option

            if hint := peers_option(str(getattr(error, "option_name", ""))):
                ctx.fail(hint)
            raise


def with_flags(kind: type[SettingsT]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of `run(settings)` with an optional flag for each field of `kind`.

    Typer reads further parameters of `run`. The command raises StartupError if a setting is invalid.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        _, *others = inspect.signature(run, eval_str=True).parameters.values()
        flags = [_parameter(kind, name) for name in kind.model_fields]

        def command(**given: Flag) -> None:
            rest = {other.name: given.pop(other.name) for other in others}
            try:
                settings = load(kind, **given)
            except StartupError:
                if (given.get("log_format") or log_format()) == "json":
                    logs.set_up("json")  # so that the error is a line of JSON, too
                raise
            run(settings, **rest)

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*flags, *(other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others)]
        )
        return command

    return decorate


def _parameter(kind: type[WorkerSettings], name: str) -> inspect.Parameter:
    option = getitem(cast("Any", Annotated), (_type(kind, name) | None, typer.Option(help=_help(kind, name))))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _type(of: type[WorkerSettings], name: str) -> type:
    """Return the type of a flag; the settings parse text themselves."""
    field = of.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    return next((kind for kind in (bool, int, float, Path) if kinds == [kind]), str)


def _help(kind: type[WorkerSettings], name: str) -> str:
    meaning, default = described(kind, name)
    return f"{meaning} Default: {default}." if default else meaning


if TYPE_CHECKING:
    from server.client.client import Client
    from server.client.connection import ClientError

INTERRUPTED = 130
SCRIPTS_WIDTH = 1000
"""Of tables that no terminal shows: a script that reads one gets each row on one line."""
_ADVICE = {
    "force_delete": "--force deletes aliases with it",
    "list_datasets": "`smolora datasets` lists them",
    "list_jobs": "`smolora jobs` lists them",
    "list_keys": "`smolora keys list` lists them",
    "list_projects": "`smolora projects list` lists them",
    "omit_project": "the adapter is another project's",
    "send_key": "set SMOLORA_API_KEY, or give --api-key",
}
"""What the command line advises for the server's hints, by their codes."""
_NUMBERS = ("rank", "rows", "size", "loss", "held out", "base's", "steps")
_NAMES = ("adapter", "data set", "job", "key", "name", "project", "state", "status")
_WHOLE = (*_NAMES, *_NUMBERS)  # columns that stay on one line

Document = Mapping[str, object]
UrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="SMOLORA_URL", help="Where the server is. Default: this machine, at SMOLORA_PORT, else 8000."
    ),
]
KeyOption = Annotated[
    str | None, typer.Option(envvar="SMOLORA_API_KEY", help="A key, where the server asks for one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Send it as a user's message, not as plain text.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Default: 64.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0: greedy. Default: 0.7.")]
TopPOption = Annotated[float | None, typer.Option(help="Default: 1.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")]


@contextmanager
def connected(url: str | None, api_key: str | None) -> "Iterator[Client]":
    """A client; what the server refuses ends the command."""
    from server.client.client import Client
    from server.client.connection import ClientError

    try:
        with Client(url or server_url(), api_key) as client:
            yield client
    except ClientError as error:
        say_refused(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def say_refused(error: "ClientError") -> None:
    """Tell what a server refused, or why there is none."""
    for line in advised(error).splitlines():
        typer.echo(f"smolora: {line}", err=True)


def refuse_options_before(context: typer.Context) -> None:
    """Raise BadParameter where options stand before one of a group's commands, which would not be told of them."""
    for option in context.params:
        source = context.get_parameter_source(option)
        if context.invoked_subcommand is not None and source is not None and source.name == "COMMANDLINE":
            flag = {"as_json": "--json"}.get(option, f"--{option.replace('_', '-')}")
            command = f"{context.info_name} {context.invoked_subcommand}"
            raise typer.BadParameter(f"give it behind the command: {command} … {flag}", param_hint=flag)


def advised(error: "ClientError | SmoloraError") -> str:
    """Return the error's message, with the command line's advice instead of HTTP's."""
    message, hint = str(error), error.hint
    return message if hint is None else message.replace(hint.text, _ADVICE.get(hint.code, hint.text))


def suggestion(*arguments: str, client: "Client | None" = None) -> str:
    """A command that can be pasted as it is: with --url where it would otherwise find another server."""
    place = [] if client is None or client.url == server_url().rstrip("/") else ["--url", client.url]
    return " ".join([program(), *map(shlex.quote, [*arguments, *place])])


def start_of(prompt: str, chat: bool, system: str | None = None) -> dict[str, object]:
    """What the answer goes on from: the text, or a user's message, which a `system` message makes it too."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*turns, {"role": "user", "content": prompt}]} if chat or turns else {"prompt": prompt}


def given(**options: object) -> dict[str, object]:
    """Those that aren't None: what is left out is the server's to decide. Numbers must be `finite`."""
    for name, value in options.items():
        if isinstance(value, float):
            finite(value, f"--{name.replace('_', '-')}")
    return {name: value for name, value in options.items() if value is not None}


def finite(value: float, option: str) -> float:
    """The value. Raises typer.BadParameter on NaN and infinity, which JSON doesn't have."""
    if not math.isfinite(value):
        raise typer.BadParameter("it must be finite", param_hint=option)
    return value


def number(value: object) -> str:
    """A loss for a table."""
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def print_json(document: Document) -> None:
    """One document on standard output, and nothing else; in ASCII where that has another encoding than UTF-8."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"  # it may be closed
    typer.echo(json.dumps(document, indent=2, ensure_ascii=not is_utf8))


def print_warnings(texts: Sequence[str]) -> None:
    """What the server says of the adapters, on standard error: each line once."""
    for text in dict.fromkeys(texts):
        typer.echo(f"smolora: {text}", err=True)


def table_of(*titles: str) -> Table:
    """An empty one; numbers stand on the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        justify: Literal["right", "left"] = "right" if title in _NUMBERS else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title in _WHOLE)
    return table


def show(table: Table) -> None:
    """Print it. Ids and numbers stay whole, on a terminal too narrow for them as well."""
    console = Console(highlight=False)
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    needed = sum((column.min_width or 1) + 2 for column in table.columns)
    console.width = max(console.width, needed) if console.is_terminal else SCRIPTS_WIDTH
    console.print(table, crop=False)


def part_of(document: Document, name: str) -> Mapping[str, object]:
    """An object within a document."""
    return cast("Mapping[str, object]", document[name])
