"""A flag for each field of the settings, so that each is spelled once, in `server.config`; and options that others
have, which a command has by another name."""

import inspect
from collections.abc import Callable
from operator import getitem
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand

from server import logs
from server.config import Flag, SettingsT, WorkerSettings, described, load
from server.config.environment import log_format
from server.errors import StartupError


class PeersOptions(TyperCommand):
    """A command that names its own option where PEFT's or TRL's is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # its type is private to Typer
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of a class that is private to Typer, too
            from server.api.errors.near_names import peers_option

            if told := peers_option(str(getattr(error, "option_name", ""))):
                ctx.fail(told)
            raise


def with_flags(kind: type[SettingsT]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of `run(settings)`, with a flag for each field of `kind`, none of them required.

    Further parameters of `run` are flags as Typer reads them. Raises StartupError on what is no such setting.
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
                    logs.set_up("json")  # what is raised is told as the log is
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
    """As the command line takes it; the settings make of a text what they need."""
    field = of.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    return next((kind for kind in (bool, int, float, Path) if kinds == [kind]), str)


def _help(kind: type[WorkerSettings], name: str) -> str:
    meaning, default = described(kind, name)
    return f"{meaning} Default: {default}." if default else meaning
