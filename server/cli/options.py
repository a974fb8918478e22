"""Flags made of the settings' fields, which only `server.config` spells; hints for PEFT's and TRL's options."""

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
    """A command that names its own option if it is given PEFT's or TRL's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # its type is private to Typer
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # its class is private to Typer, too
            from server.api.errors.near_names import peers_option

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
