"""The `smolora` script: `serve`, `worker`, and the commands of the other modules.

Slow modules are imported when needed, so that `--help` is instant. If the server can't start, the reason is one
line on stderr, in JSON if the log is, and the exit code is 1.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # pip checks this, but a checkout on the path may be run without pip
    sys.exit(f"smolora needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

import logging
import os
import signal
from io import TextIOWrapper
from typing import Annotated

import typer

from server import __version__
from server.cli.accounts import keys_group, projects_group
from server.cli.adapters import compose
from server.cli.adapters import group as adapters
from server.cli.check import check_here
from server.cli.cluster import group as cluster
from server.cli.common import Commands, PeersOptions, with_flags
from server.cli.decide import decide
from server.cli.evaluate import evaluate
from server.cli.generate import chat, compare, generate
from server.cli.home import refuse_unmade
from server.cli.maintenance import backup, doctor, prune, restore
from server.cli.maintenance import group as move
from server.cli.serve import serve_here
from server.cli.train import group as datasets
from server.cli.train import jobs, train
from server.config import Settings, WorkerSettings
from server.config.environment import forget_keys, hide_keys, unknown_variables
from server.errors import StartupError
from server.telemetry import logs

app = typer.Typer(
    name="smolora",
    cls=Commands,
    help="One frozen SmolLM, any LoRA adapter per request: train, serve, version, blend. The base never changes.",
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
    has_clients_key = forget_keys()
    _exit_on_sigterm()
    raise typer.Exit(serve_here(settings, has_clients_key=has_clients_key))


@app.command()
@with_flags(WorkerSettings)
def worker(settings: WorkerSettings) -> None:
    """Train queued jobs, one at a time, until stopped. `serve` starts SMOLORA_WORKERS workers itself."""
    _exit_on_sigterm()
    os.umask(0o077)
    from server.jobs.worker import run_worker

    logs.set_up(settings.log_format)
    log = logging.getLogger("smolora.worker")
    for line in unknown_variables():
        log.warning(line)
    refuse_unmade(settings)
    log.info("waiting for jobs in %s", settings.home.absolute())
    raise typer.Exit(run_worker(settings))


@app.command()
@with_flags(Settings)
def check(settings: Settings) -> None:
    """Compare the code that would serve on this machine with torch: fixed prompts, adapters and seeded draws.

    The exit code is 1 if a difference is too large.
    """
    raise typer.Exit(check_here(settings))


app.command(cls=PeersOptions)(train)
for _command in (generate, chat, compare, decide, evaluate, compose, jobs, doctor, prune, backup, restore):
    app.command()(_command)
app.add_typer(adapters, name="adapters")
app.add_typer(cluster, name="cluster")
app.add_typer(datasets, name="datasets")
app.add_typer(keys_group, name="keys")
app.add_typer(move, name="move")
app.add_typer(projects_group, name="projects")


def _exit_on_sigterm() -> None:
    """Exit on SIGTERM until the server or worker handles it. By default a container's first process ignores it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def main() -> None:
    """Run the `smolora` script."""
    hide_keys()
    if isinstance(sys.stdout, TextIOWrapper):  # escape unencodable characters, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except StartupError as error:
        if logs.is_json():
            logging.getLogger("smolora.run").critical("%s", error)
        else:
            typer.echo(f"smolora: {error}", err=True)
        sys.exit(1)
