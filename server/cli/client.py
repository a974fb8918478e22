"""Commands that speak to a running server: `smolora generate`, `adapters` and `jobs`; see also `server.cli.train`.

Each works against any URL, with a key, and prints JSON for scripts with --json. What the server refuses is a line
or several on stderr, and exit code 1. What is slow to import is imported when needed.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from server.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"
INTERRUPTED = 130
_ALL = 7  # linear modules of a layer
_NUMBERS = ("rank", "size", "loss", "held out", "base's", "steps")
_WHOLE = ("adapter", "job", "name", "status", *_NUMBERS)  # columns that stay on one line

Document = Mapping[str, object]
UrlOption = Annotated[str, typer.Option(envvar="SMOLORA_URL", help="Where the server is.")]
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
def connected(url: str, api_key: str | None) -> "Iterator[Client]":
    """A client; what the server refuses ends the command."""
    from server.client import Client, ClientError

    try:
        with Client(url, api_key) as client:
            yield client
    except ClientError as error:
        for line in str(error).splitlines():
            typer.echo(f"smolora: {line}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def start_of(prompt: str, chat: bool) -> dict[str, object]:
    """What the answer goes on from: the text, or a user's message."""
    return {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Such as tweets, tweets@3 or tweets*0.7+movies*0.3.")
    ] = None,
    chat: ChatOption = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one.")] = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Generate text, under an adapter, a weighted blend of several, or none."""
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat), **given(adapter=adapter), **sampling}
    with connected(url, api_key) as client:
        if as_json:
            print_json(client.generate(body))
            return
        warnings: Sequence[str] = ()
        for event in client.stream(body):
            typer.echo(event.get("text", ""), nl=False)
            sys.stdout.flush()
            warnings = cast("Sequence[str]", event.get("warnings", warnings))
        typer.echo()
        print_warnings(warnings)


def adapters(as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """List the adapters with their versions."""
    with connected(url, api_key) as client:
        found = list(client.adapters())
    if as_json:
        print_json({"adapters": found})
        return
    table = _table("adapter", "aliases", "rank", "modules", "size", "loss", "base's")
    for adapter in found:
        names = {adapter["latest"]: ["latest"]}
        for alias, version in _of(adapter, "aliases").items():
            names.setdefault(version, []).append(alias)
        for version in cast("Sequence[Document]", adapter["versions"]):
            metrics, modules = _of(version, "metrics"), cast("Sequence[str]", version["target_modules"])
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
    _show(table)


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="One job; all of them without it.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the job until it ends.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the job.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Have it wait until it is resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Let it go on.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the rows, checkpoints, model and log of one that has ended.")
    ] = False,
    status: Annotated[str | None, typer.Option(help="Only jobs that are queued, running, paused, …")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """List training jobs, the newest first; or show, watch and steer one."""
    moves = [name for name, is_set in (("cancel", cancel), ("pause", pause), ("resume", resume)) if is_set]
    if len(moves) + delete > 1 or ((moves or follow or delete) and job_id is None):
        raise typer.BadParameter("give a job, and one thing to do with it")
    with connected(url, api_key) as client:
        if job_id is None:
            found = client.jobs(status, limit)
            print_json({"jobs": found}) if as_json else _show(_jobs_table(found))
            return
        if delete:
            client.remove_files(job_id)
        job = client.steer(job_id, moves[0]) if moves else client.job(job_id)
        if follow:
            from server.cli.train import watch

            raise typer.Exit(watch(client, job, as_json))
        print_json(job) if as_json else _show(_jobs_table([job]))
        if not as_json and job["error"]:
            Console().print(Text(str(job["error"]), style="red"))


def given(**options: object) -> dict[str, object]:
    """Those that aren't None: what is left out is the server's to decide."""
    return {name: value for name, value in options.items() if value is not None}


def number(value: object) -> str:
    """A loss for a table."""
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def print_json(document: Document) -> None:
    """One document on standard output, and nothing else."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_warnings(texts: Sequence[str]) -> None:
    """What the server says of the adapters, on standard error: each line once."""
    for text in dict.fromkeys(texts):
        typer.echo(f"smolora: {text}", err=True)


def _jobs_table(jobs: Sequence[Document]) -> Table:
    table = _table("job", "name", "status", "steps", "loss", "held out", "base's", "adapter")
    for job in jobs:
        progress, metrics = _of(job, "progress"), _of(job, "metrics")
        status = str(job["status"])
        if job["position"] is not None:
            status += f" ({job['position']})"
        adapter = "" if job["adapter"] is None else "{name}@{version}".format(**_of(job, "adapter"))
        table.add_row(
            Text(str(job["id"])),
            Text(str(job["name"])),
            Text("pausing" if job["pausing"] else status),
            f"{progress['step']}/{progress['total_steps']}",
            number(metrics["train_loss"]),
            number(metrics["eval_loss"]),
            number(metrics["base_eval_loss"]),
            Text(adapter),
        )
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        justify: Literal["right", "left"] = "right" if title in _NUMBERS else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title in _WHOLE)
    return table


def _show(table: Table) -> None:
    console = Console(highlight=False)
    # a script that reads it gets each row on one line, however wide
    console.print(table, width=None if console.is_terminal else 1000, crop=False)


def _of(document: Document, name: str) -> Mapping[str, object]:
    return cast("Mapping[str, object]", document[name])
