"""`smolora datasets`: list them, upload one, delete one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.text import Text

from server.cli.common import (
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    part_of,
    print_json,
    print_warnings,
    refuse_options_before,
    show,
    table_of,
)
from server.counted import counted

group = typer.Typer(invoke_without_command=True, help="List the data sets; upload or delete one.")


@group.callback()
def _list(
    context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    refuse_options_before(context)
    if context.invoked_subcommand is not None:
        return
    with connected(url, api_key) as client:
        found = client.datasets()
    if as_json:
        print_json({"datasets": found})
        return
    table = table_of("data set", "file", "rows", "size", "kinds", "created")
    for dataset in found:
        kinds = ", ".join(f"{count} {kind}" for kind, count in part_of(dataset, "kinds").items() if count)
        size = f"{cast('int', dataset['bytes']) / 1e3:,.1f} kB"
        names = Text(str(dataset["id"])), Text(str(dataset["filename"] or ""))
        table.add_row(*names, f"{dataset['rows']:,}", size, kinds, str(dataset["created_at"]))
    show(table)


@group.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A .jsonl or .csv file.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Upload rows, to train on them more than once. The same rows always get the same id."""
    with connected(url, api_key) as client:
        try:
            dataset: Mapping[str, object] = client.upload(path)
        except OSError as error:
            typer.echo(f"smolora: {path}: {error.strerror}", err=True)
            raise typer.Exit(1) from None
    print_warnings(cast("list[str]", dataset["warnings"]))
    print_json(dataset) if as_json else typer.echo(
        f"{dataset['id']}: {counted(cast('int', dataset['rows']), 'row')}"
    )


@group.command()
def delete(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As listed.")],
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Delete data sets. Jobs that have ended don't need them any more."""
    with connected(url, api_key) as client:
        for dataset_id in cast("Sequence[str]", ids):
            client.delete_dataset(dataset_id)
            typer.echo(f"{dataset_id} is deleted")
