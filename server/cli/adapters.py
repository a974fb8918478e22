"""`smolora adapters` and `compose`: list, show, import, download, delete and name adapters, and name blends."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from adapters.names import alias_fault
from server.cli.common import (
    Commands,
    DetachOption,
    Document,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    fail,
    given,
    part_of,
    print_json,
    print_warnings,
    refuse_options_before,
    show,
    table_of,
)
from server.cli.train import watch

if TYPE_CHECKING:
    from server.client.client import Client

_NUM_MODULES = 7  # linear modules of a layer
_VERSION = re.compile(r"[0-9]{1,18}")

group = typer.Typer(
    cls=Commands, invoke_without_command=True, help="List adapters with their versions; or work on one."
)

ReferenceArgument = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Such as tweets or tweets@2.")]
MeantArgument = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", help="Such as tweets, tweets@2 or tweets@prod.")
]


@group.callback()
def _list(
    context: typer.Context,
    public: Annotated[bool, typer.Option("--public", help="List the public adapters of all projects.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    refuse_options_before(context)
    if context.invoked_subcommand is None:
        _print_all(public, as_json, url, api_key)


def _print_all(public: bool, as_json: bool, url: str | None, api_key: str | None) -> None:
    with connected(url, api_key) as client:
        found = list(client.adapters(public))
    print_json({"adapters": found}) if as_json else show(_table(found))


def _table(adapters: Sequence[Document]) -> Table:
    # no losses: those of two versions may be of different rows
    table = table_of("adapter", "aliases", "rank", "modules", "size", "recall", "than before")
    for adapter in adapters:
        names = {adapter["latest"]: ["latest"]}
        for alias, version in part_of(adapter, "aliases").items():
            names.setdefault(version, []).append(alias)
        for version in cast("Sequence[Document]", adapter["versions"]):
            modules = cast("Sequence[str]", version["target_modules"])
            recall = cast("float | None", part_of(version, "metrics").get("recall"))
            names_of = ", ".join(name.removesuffix("_proj") for name in modules)
            shown = names_of if len(modules) < _NUM_MODULES else "all-linear"
            table.add_row(
                Text(f"{version['name']}@{version['version']}"),
                Text(", ".join(names.get(version["version"], []))),
                str(version["rank"]),
                Text(str(version["parent"] or shown)) if version["kind"] == "composition" else shown,
                f"{cast('int', version['bytes']) / 1e6:,.1f} MB",
                "" if recall is None else f"{recall:.1%}",
                Text(str(version.get("verdict") or "")),
            )
    return table


def _parsed(reference: str) -> tuple[str, int | None]:
    """Split `name` or `name@version` into a name and a version or None.

    Raise BadParameter if the version isn't a number.
    """
    name, _, version = reference.partition("@")
    if "@" in reference and not _VERSION.fullmatch(version):
        raise typer.BadParameter(f"{reference}: give a version's number behind the @, such as {name}@1")
    return name, int(version) if version else None


def _meant(client: "Client", reference: str) -> tuple[str, int | None]:
    """Split `name`, `name@version` or `name@alias` into a name and a version or None.

    The server is asked for the version of an alias.
    """
    name, _, alias = reference.partition("@")
    if alias_fault(alias):
        return _parsed(reference)
    found = client.adapter(name)
    aliases = cast("dict[str, int]", found["aliases"]) | {"latest": cast("int", found["latest"])}
    if alias not in aliases:
        fail(f"no such alias: {reference} (there are {', '.join(sorted(aliases))})")
    return name, aliases[alias]


@group.command("show")
def show_adapter(
    reference: MeantArgument, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    """Show an adapter's versions, or all that is stored about one version."""
    with connected(url, api_key) as client:
        name, number_of = _meant(client, reference)
        found = client.adapter(name) if number_of is None else client.version(name, number_of)
    if as_json:
        print_json(found)
    elif number_of is None:
        show(_table([found]))
    else:
        for field, value in found.items():
            if value not in (None, [], {}):
                typer.echo(
                    f"{field}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
                )


@group.command()
def delete(
    reference: ReferenceArgument,
    force: Annotated[bool, typer.Option("--force", help="Also delete the aliases that point to it.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Delete one version, or an adapter with all its versions. Running requests keep using it until they end."""
    name, number_of = _parsed(reference)
    with connected(url, api_key) as client:
        client.delete_adapter(name, number_of, force)
    typer.echo(f"{reference} is deleted")


@group.command()
def download(
    reference: MeantArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The zip to write, or a folder for it. Default: NAME-VERSION.zip."),
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Download a version as a zip. PEFT reads the unpacked folder."""
    with connected(url, api_key) as client:
        name, number_of = _meant(client, reference)
        version = cast("int", client.adapter(name)["latest"]) if number_of is None else number_of
        default = f"{name.replace('/', '-')}-{version}.zip"  # another project's adapter has a slash in its name
        target = output or Path(default)
        if target.is_dir():
            target /= default
        try:
            client.download(name, version, target)
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}")
    typer.echo(str(target), err=_is_output(target))


def _is_output(path: Path) -> bool:
    """Return whether writing to `path` may write to stdout, so that messages must go to stderr."""
    if not path.is_file():
        return True
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:  # stdout is closed
        return False


@group.command()
def alias(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    alias: Annotated[str, typer.Argument(help="Such as prod, or latest.")],
    version: Annotated[int | None, typer.Argument(help="The version to point it at.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Point an alias at a version, or remove it. To roll back, point latest at an earlier version."""
    if remove == (version is not None):
        raise typer.BadParameter("give a version, or --remove")
    with connected(url, api_key) as client:
        if version is None:
            client.unpoint(name, alias)
        else:
            client.point(name, alias, version)
    typer.echo(f"{name}@{alias} is removed" if version is None else f"{name}@{alias} is {name}@{version} now")


@group.command()
def share(
    name: Annotated[str, typer.Argument(help="The adapter or composition.")],
    stop: Annotated[bool, typer.Option("--stop", help="Make it private again.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Let other projects use an adapter, with all its versions, as PROJECT/NAME."""
    with connected(url, api_key) as client:
        client.set_visibility(name, "private" if stop else "public")
    typer.echo(f"{name} is {'private' if stop else 'public'} now")


@group.command("import")
def import_adapter(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A folder that PEFT saved, or a zip of it; with --hub a repository's id."
        ),
    ],
    name: Annotated[str, typer.Option(help="The adapter's name: each import adds a version.")],
    hub: Annotated[
        bool,
        typer.Option("--hub", help="Let the server fetch it from the Hugging Face hub, if that is allowed."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="A commit, tag or branch on the hub. Default: the newest commit.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Publish an adapter as the next version of a name. Unsupported options are refused, naming each key."""
    if revision is not None and not hub:
        raise typer.BadParameter("is only for adapters of the hub: add --hub", param_hint="--revision")
    if not hub and not Path(source).exists():
        raise typer.BadParameter(f"{source} doesn't exist; add --hub if it is on the hub", param_hint="PATH")
    with connected(url, api_key) as client:
        try:
            version = client.import_adapter(name, source, revision) if hub else client.publish(name, Path(source))
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}")
    if as_json:
        print_json(version)
        return
    typer.echo(f"{version['name']}@{version['version']}: rank {version['rank']}, digest {version['digest']}")
    print_warnings(cast("list[str]", version["warnings"]))


def compose(
    name: Annotated[str, typer.Argument(help="The name of the blend.")],
    expression: Annotated[str, typer.Argument(help="Such as tweets*0.7+movies@2*0.3.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="Merge the parts into one adapter, in a job: ties, dare_linear, dare_ties, magnitude_prune or "
            "svd. Default: no merge; each request computes the exact sum."
        ),
    ] = None,
    density: Annotated[float | None, typer.Option(help="For a merge: the share of entries to keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="For a merge: the rank of the result.")] = None,
    seed: Annotated[int | None, typer.Option(help="For dare_linear and dare_ties.")] = None,
    detach: DetachOption = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Name a weighted blend of adapters, pinned to their present versions; or merge it into a new adapter."""
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
