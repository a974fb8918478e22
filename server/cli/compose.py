"""`smolora compose`: name a blend, or merge its parts into one new adapter."""

from typing import Annotated, cast

import typer

from server.cli.common import JsonOption, KeyOption, UrlOption, connected, given, print_json, print_warnings
from server.cli.train import watch


def compose(
    name: Annotated[str, typer.Argument(help="What the blend is called from now on.")],
    expression: Annotated[str, typer.Argument(help="Such as tweets*0.7+movies@2*0.3.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="Merge the parts into one adapter, by a job: ties, dare_linear, dare_ties, magnitude_prune or "
            "svd. Default: none; the sum is computed exactly at each request."
        ),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of a merge: the share of entries that is kept.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the merged adapter.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare_linear and dare_ties.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Don't wait for a merge's end.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Name a weighted blend of adapters, pinned to the versions of now; or merge it into a new adapter."""
    body = given(expression=expression, method=method, density=density, rank=rank, seed=seed)
    with connected(url, api_key) as client:
        made = client.compose(name, body)
        if method is not None and not detach:
            raise typer.Exit(watch(client, made, as_json))
    if as_json:
        print_json(made)
    elif method is not None:
        typer.echo(made["id"])
    else:
        typer.echo(f"{made['name']}@{made['version']}: {made['parent']}")
        print_warnings(cast("list[str]", made["warnings"]))
