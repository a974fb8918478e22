"""`smolora adapters`: list them, and `smolora adapters import`: publish one from a folder, a zip, or the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.text import Text

from server.cli.common import (
    DEFAULT_URL,
    Document,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    number,
    part_of,
    print_json,
    print_warnings,
    show,
    table_of,
)

_ALL = 7  # linear modules of a layer

group = typer.Typer(invoke_without_command=True, help="List the adapters with their versions; or import one.")


@group.callback()
def _list(
    context: typer.Context, as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None
) -> None:
    if context.invoked_subcommand is None:
        _print_all(as_json, url, api_key)


def _print_all(as_json: bool, url: str, api_key: str | None) -> None:
    with connected(url, api_key) as client:
        found = list(client.adapters())
    if as_json:
        print_json({"adapters": found})
        return
    table = table_of("adapter", "aliases", "rank", "modules", "size", "loss", "base's")
    for adapter in found:
        names = {adapter["latest"]: ["latest"]}
        for alias, version in part_of(adapter, "aliases").items():
            names.setdefault(version, []).append(alias)
        for version in cast("Sequence[Document]", adapter["versions"]):
            metrics, modules = part_of(version, "metrics"), cast("Sequence[str]", version["target_modules"])
            names_of = ", ".join(name.removesuffix("_proj") for name in modules)
            shown = names_of if len(modules) < _ALL else "all-linear"
            table.add_row(
                Text(f"{version['name']}@{version['version']}"),
                Text(", ".join(names.get(version["version"], []))),
                str(version["rank"]),
                Text(str(version["parent"])) if version["kind"] == "composition" else shown,
                f"{cast('int', version['bytes']) / 1e6:,.1f} MB",
                number(metrics.get("eval_loss")),
                number(metrics.get("base_eval_loss")),
            )
    show(table)


@group.command("import")
def import_adapter(
    source: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A folder that PEFT saved, or a zip of it; with --hub an id there."),
    ],
    name: Annotated[str, typer.Option(help="The adapter that it becomes a version of.")],
    hub: Annotated[
        bool,
        typer.Option("--hub", help="Have the server fetch it from the Hugging Face hub, where that is allowed."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Of the hub's: a commit, tag or branch. Default: the newest commit.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Publish an adapter as the name's next version. What can't be honoured is refused, naming each key."""
    if revision is not None and not hub:
        raise typer.BadParameter("is for adapters of the hub: add --hub", param_hint="--revision")
    if not hub and not Path(source).exists():
        raise typer.BadParameter(f"{source} is not here; add --hub where the hub has it", param_hint="PATH")
    with connected(url, api_key) as client:
        try:
            version = client.import_adapter(name, source, revision) if hub else client.publish(name, Path(source))
        except OSError as error:
            typer.echo(f"smolora: {error.filename}: {error.strerror}", err=True)
            raise typer.Exit(1) from None
    if as_json:
        print_json(version)
        return
    typer.echo(f"{version['name']}@{version['version']}: rank {version['rank']}, digest {version['digest']}")
    print_warnings(cast("list[str]", version["warnings"]))
