"""Code that commands share: options, the connection to a server, output, and flags made from the settings.

Commands that call a server work with any URL, can send a key, and print JSON with --json. If the server refuses a
request, they print the reason on stderr and exit with code 1. Slow modules are imported when they are needed.
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
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast, get_args

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from adapters.errors import SmoloraError
from adapters.names import near
from server.config import Flag, SettingsT, WorkerSettings, described, load
from server.config.environment import log_format, server_url
from server.errors import StartupError
from server.system.messages import program
from server.telemetry import logs

if TYPE_CHECKING:
    from server.client.client import Client
    from server.client.connection import ClientError

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
SCRIPTS_WIDTH = 1000
"""The width of tables that aren't printed on a terminal, so that scripts get each row on one line."""
_ADVICE = {
    "force_delete": "--force deletes aliases with it",
    "list_datasets": "`smolora datasets` lists them",
    "list_jobs": "`smolora jobs` lists them",
    "list_keys": "`smolora keys list` lists them",
    "list_projects": "`smolora projects list` lists them",
    "omit_project": "the adapter is another project's",
    "replace_key": "that of SMOLORA_API_KEY or --api-key is unknown, revoked or expired; "
    "`smolora keys create NAME` makes one",
    "send_key": "set SMOLORA_API_KEY, or give --api-key",
}
"""The command line's advice, by the code of an error's hint."""
_NUMBERS = ("rank", "rate", "recall", "rows", "size", "loss", "held out", "base's", "steps")
_NAMES = ("adapter", "data set", "job", "key", "name", "project", "state", "status")
_WHOLE = (*_NAMES, *_NUMBERS)  # columns that stay on one line

Document = Mapping[str, object]
UrlOption = Annotated[
    str | None,
    typer.Option(
        envvar="SMOLORA_URL", help="The server's address. Default: this machine, at SMOLORA_PORT, else 8000."
    ),
]
KeyOption = Annotated[
    str | None, typer.Option(envvar="SMOLORA_API_KEY", help="The API key, if the server needs one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Don't wait until the job ends.")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Such as tweets, tweets@3 or tweets*0.7+movies*0.3.")
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Default: 64.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0: greedy. Default: 0.7.")]
TopPOption = Annotated[float | None, typer.Option(help="Default: 1.")]
SeedOption = Annotated[int | None, typer.Option(help="Default: random.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text. May be given more than once.")]


@contextmanager
def connected(url: str | None, api_key: str | None) -> "Iterator[Client]":
    """Yield a client. Exit if the server refuses a request or can't be reached, or if the user interrupts."""
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


def say(line: str) -> None:
    """Print a line on stderr, so that stdout has only what a script asked for."""
    typer.echo(f"smolora: {line}", err=True)


def fail(line: str) -> NoReturn:
    """Print a line on stderr, and end the command with exit code 1."""
    say(line)
    raise typer.Exit(1) from None


def say_refused(error: "ClientError") -> None:
    """Print why a server refused a request, or why it can't be reached."""
    for line in advised(error).splitlines():
        say(line)


def advised(error: "ClientError | SmoloraError") -> str:
    """Return the error's message, in which advice for users of the command line replaces advice on HTTP."""
    message, hint = str(error), error.hint
    return message if hint is None else message.replace(hint.text, _ADVICE.get(hint.code, hint.text))


def print_warnings(texts: Sequence[str]) -> None:
    """Print the server's warnings on stderr, without repetitions."""
    for text in dict.fromkeys(texts):
        say(text)


def refuse_options_before(context: typer.Context) -> None:
    """Raise BadParameter if options precede a command of a group, since the command wouldn't get them."""
    for option in context.params:
        source = context.get_parameter_source(option)
        if context.invoked_subcommand is not None and source is not None and source.name == "COMMANDLINE":
            flag = {"as_json": "--json"}.get(option, f"--{option.replace('_', '-')}")
            command = f"{context.info_name} {context.invoked_subcommand}"
            raise typer.BadParameter(f"give it behind the command: {command} … {flag}", param_hint=flag)


def suggestion(*arguments: str, client: "Client | None" = None) -> str:
    """Return a command for users to paste.

    The command has the option --url if that is needed to reach the same server as `client`.
    """
    place = [] if client is None or client.url == server_url().rstrip("/") else ["--url", client.url]
    return " ".join([program(), *map(shlex.quote, [*arguments, *place])])


def start_of(prompt: str, chat: bool, system: str | None = None) -> dict[str, object]:
    """Return a request's field `messages` for a chat or with a system message, else its field `prompt`."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*turns, {"role": "user", "content": prompt}]} if chat or turns else {"prompt": prompt}


def given(**options: object) -> dict[str, object]:
    """Return the options that aren't None, since the server has defaults for the others.

    Raise BadParameter if an option is NaN or infinite.
    """
    for name, value in options.items():
        if isinstance(value, float):
            finite(value, f"--{name.replace('_', '-')}")
    return {name: value for name, value in options.items() if value is not None}


def finite(value: float, option: str) -> float:
    """Return the value. Raise typer.BadParameter for NaN and infinity, which JSON doesn't have."""
    if not math.isfinite(value):
        raise typer.BadParameter("it must be finite", param_hint=option)
    return value


def each_alone(adapters: Sequence[str]) -> Sequence[str]:
    """Return the values of --adapter. Raise BadParameter if a value lists several adapters."""
    for value in adapters:
        if "," in value:
            several = " ".join(f"-a {part.strip()}" for part in value.split(",") if part.strip())
            raise typer.BadParameter(
                f"give the option once for each adapter, as in {several}; a blend joins its parts with +",
                param_hint="--adapter",
            )
    return adapters


def number(value: object) -> str:
    """Format a loss for a table; anything but a number is an empty cell."""
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def part_of(document: Document, name: str) -> Document:
    """Return the object with this name within a document."""
    return cast("Document", document[name])


def print_json(document: Document, err: bool = False) -> None:
    """Print a JSON document, in ASCII if stdout's encoding isn't UTF-8."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"  # None if closed
    typer.echo(json.dumps(document, indent=2, ensure_ascii=not is_utf8), err=err)


def table_of(*titles: str) -> Table:
    """Return an empty table. Numbers are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        justify: Literal["right", "left"] = "right" if title in _NUMBERS else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title in _WHOLE)
    return table


def show(table: Table) -> None:
    """Print a table. Names and numbers aren't wrapped, even if the terminal is too narrow for them."""
    console = Console(highlight=False)
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    needed = sum((column.min_width or 1) + 2 for column in table.columns)
    console.width = max(console.width, needed) if console.is_terminal else SCRIPTS_WIDTH
    console.print(table, crop=False)


def with_flags(kind: type[SettingsT]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that turns `run(settings, ...)` into a command with a flag for each field of `kind`.

    All flags are optional. The other parameters of `run` are declared as usual with Typer. The command raises
    StartupError if a setting is invalid.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        _, *others = inspect.signature(run, eval_str=True).parameters.values()
        flags = [_parameter(kind, name) for name in kind.model_fields]

        def command(**values: Flag) -> None:
            rest = {other.name: values.pop(other.name) for other in others}
            try:
                settings = load(kind, **values)
            except StartupError:
                if (values.get("log_format") or log_format()) == "json":
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
    """Return the type of the flag for a setting: `str` if only the settings class can parse the value."""
    field = of.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    return next((kind for kind in (bool, int, float, Path) if kinds == [kind]), str)


def _help(kind: type[WorkerSettings], name: str) -> str:
    meaning, default = described(kind, name)
    return f"{meaning} Default: {default}." if default else meaning


class PeersOptions(TyperCommand):
    """A command whose error for an option of PEFT or TRL, such as --lora-r, suggests the command's own option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # its type is private to Typer
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # the error's class is private to Typer, too
            from server.api.near_names import peers_option

            if hint := peers_option(str(getattr(error, "option_name", ""))):
                ctx.fail(hint)
            raise


_DESTRUCTIVE = frozenset({"delete", "down", "move", "prune", "restart", "restore", "revoke"})
_HABITS = {
    "create": "train",
    "finetune": "train",
    "list": "adapters",
    "ls": "adapters",
    "ps": "jobs",
    "run": "chat",
    "start": "serve",
}
"""Commands of similar programs, with our commands."""


class Commands(TyperGroup):
    """A group of commands. For an unknown command it suggests a similar one, but none that deletes or stops."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401  # types that are private to Typer
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            harmless = self.commands.keys() - _DESTRUCTIVE
            meant = _HABITS.get(name)
            meant = meant if meant in harmless else near(name, harmless)
            ctx.fail(f"No such command '{name}'." + (f" Did you mean '{meant}'?" if meant else ""))
        return super().resolve_command(ctx, args)
