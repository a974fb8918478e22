"""The command line: `smolora serve` and `smolora worker`; the other commands have a file each.

`--help` is instant, so what is slow to import is imported when needed.
Whatever keeps the server from starting is one line on stderr and exit code 1.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # pip would refuse; a checkout on the path would not
    sys.exit(f"smolora needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from server import __version__, logs
from server.allocator import keep_freed_memory
from server.cli.adapters import group as adapters
from server.cli.chat import chat
from server.cli.compare import compare
from server.cli.compose import compose
from server.cli.datasets import group as datasets
from server.cli.generate import generate
from server.cli.home.backup import backup, restore
from server.cli.home.doctor import doctor
from server.cli.home.keys import group as keys
from server.cli.home.projects import group as projects
from server.cli.home.prune import prune
from server.cli.jobs import jobs
from server.cli.options import with_flags
from server.cli.train import train
from server.config import Settings, WorkerSettings, is_loopback, unknown_variables
from server.config.secrets import forget_keys, hide_keys
from server.errors import StartupError
from server.home import make, prepare, serving
from server.serve.address import bind, refuse_strangers, url

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread may keep the GIL when another wants it. The engine's thread lets go of it in every
kernel, and with Python's 5 ms would wait that long to get it back from the event loop, many times a step."""

log = logging.getLogger("smolora.run")

app = typer.Typer(
    name="smolora",
    help="One frozen SmolLM, any LoRA adapter per request: train, serve, version, blend, and never merge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
@with_flags(Settings)
def serve(settings: Settings) -> None:
    """Serve generation over HTTP.

    Each flag is also an environment variable: SMOLORA_MAX_NUM_SEQS for --max-num-seqs, and so on.
    """
    forget_keys()
    _end_when_told()
    raise typer.Exit(_serve(settings))


@app.command()
@with_flags(WorkerSettings)
def worker(settings: WorkerSettings, parent: Annotated[int | None, typer.Option(hidden=True)] = None) -> None:
    """Train queued jobs, one at a time, until told to stop; `serve` runs workers of its own (SMOLORA_WORKERS)."""
    _end_when_told()
    from server.training.worker.worker import run_worker

    logs.set_up(settings.log_format)
    raise typer.Exit(run_worker(settings, parent))


for _command in (train, generate, chat, compare, compose, jobs, doctor, prune, backup, restore):
    app.command()(_command)
app.add_typer(adapters, name="adapters")
app.add_typer(datasets, name="datasets")
app.add_typer(keys, name="keys")
app.add_typer(projects, name="projects")


def _end_when_told() -> None:
    """By SIGTERM, until what is begun has its own way to end: a container's first process would ignore it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _serve(settings: Settings) -> int:
    """Everything from the settings to the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    keep_freed_memory()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if is_json := settings.log_format == "json":  # whoever reads the lines reads nothing else
        logs.set_up("json")

    def say(line: str) -> None:
        if is_json:
            log.info(line)
        else:
            console.print(f"smolora: {line}", markup=False)

    for line in unknown_variables():
        say(line)
    if not make(settings.home):
        say(f"{settings.home} is another user's, or open to others: they may read what is stored there")
    with serving(settings.home):
        prepare(settings.home)
        return _serve_at(settings, say)


def _serve_at(settings: Settings, say: Callable[[str], None]) -> int:
    """The same, in a home that is ready and nobody else's."""
    refuse_strangers(settings)
    bound = bind(settings.host, settings.port)
    say("loading libraries")
    from server.api.app import create_app
    from server.serve.first_prompts import first_prompts
    from server.serve.process import run
    from server.serve.startup import build
    from server.training.worker.supervisor import Supervisor, worker_command
    from server.training.worker.yielding import BusyFlag

    try:
        services = build(settings, say)
        flag = BusyFlag(settings.home)
    except OSError as error:
        raise StartupError(f"{error.filename or settings.home}: {error.strerror or error}") from error
    logs.set_up(settings.log_format)

    def announce() -> None:
        address, is_open = settings.public_url or url(bound, settings.host), services.access.ring.is_open
        prompts = first_prompts(address, services.encoder.has_chat_template, not is_open)
        ready = f"{services.base_name} is ready at {address} (its API: {address}/docs)."
        if settings.log_format == "json":
            say(ready)
        else:
            with suppress(OSError):  # whoever started it may have stopped reading
                typer.echo(f"smolora: {ready}")
                typer.echo("Try, in another terminal:")
                for line in prompts:
                    typer.echo(f"  {line}")
        if is_open and not is_loopback(settings.host):
            say("anybody who reaches this port can use it: no API key is asked for")

    supervisor = Supervisor(settings.workers, worker_command(settings.of_a_worker))
    serving = create_app(services)
    return run(serving, services.engine, bound, announce, supervisor, flag, settings.trusted_proxies, settings)


def main() -> None:
    """The entry point of the `smolora` script."""
    hide_keys()
    try:
        app()
    except StartupError as error:
        typer.echo(f"smolora: {error}", err=True)
        sys.exit(1)
