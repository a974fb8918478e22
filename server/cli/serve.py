"""A server process, with its own engine or as part of a cluster.

Slow modules are imported after quick checks, such as whether the port is free.
"""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from server.config import Settings, is_loopback
from server.config.environment import unknown_variables
from server.errors import StartupError
from server.serve.address import bind, first_key, refuse_strangers, url
from server.storage.home import make, prepare, serving
from server.system.memory import exempt_from_gc, keep_freed_memory
from server.system.threads import switch_quickly
from server.telemetry import logs

if TYPE_CHECKING:
    from server.serve.startup import Connect

log = logging.getLogger("smolora.run")


def serve_here(settings: Settings, connect: "Connect | None" = None, *, has_clients_key: bool = False) -> int:
    """Run a server and return its exit code. `connect` is as in `server.serve.startup.build`.

    `has_clients_key` says whether SMOLORA_API_KEY is set, perhaps by mistake for SMOLORA_API_KEYS.
    """
    os.umask(0o077)
    switch_quickly()
    keep_freed_memory()
    if is_json := settings.log_format == "json":  # for readers that parse every line
        logs.set_up("json")

    def say(line: str) -> None:
        if is_json:
            log.info(line)
        else:
            with suppress(OSError):  # the disk may be full, or the reader may be gone
                typer.echo(f"smolora: {line}", err=True)

    for line in unknown_variables():
        say(line)
    if not make(settings.home):
        say(f"{settings.home} is another user's, or open to others: they may read what is stored there")
    with serving(settings.home):
        prepare(settings.home)
        return _serve_at(settings, say, connect, has_clients_key)


def _serve_at(
    settings: Settings, say: Callable[[str], None], connect: "Connect | None", has_clients_key: bool
) -> int:
    """Run a server in a HOME that is prepared and locked. Return its exit code."""
    refuse_strangers(settings)
    bound = bind(settings.host, settings.port)
    say("loading libraries")
    with exempt_from_gc():
        from server.api.app import create_app
        from server.jobs.supervisor import Supervisor, worker_command
        from server.jobs.yielding import BusyFlag
        from server.model.device import is_out_of_memory
        from server.serve.connections import allow_files
        from server.serve.process import run
        from server.serve.startup import build, first_prompts

        settings = allow_files(settings)
        try:
            services = build(settings, say, connect=connect)
            flag = BusyFlag(settings.home)
        except (OSError, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
                raise StartupError(
                    f"no memory for {settings.model}: raise the limit of this shell (ulimit -v) or container, or "
                    "take a smaller SMOLORA_MODEL"
                ) from None
            if not isinstance(error, OSError):
                raise
            raise StartupError(f"{error.filename or settings.home}: {error.strerror or error}") from error
        app = create_app(services)
    logs.set_up(settings.log_format)

    def announce() -> None:
        address, anonymous = settings.public_url or url(bound, settings.host), services.access.ring.anonymous
        prompts = first_prompts(address, services.encoder.has_chat_template, anonymous is None)
        ready = f"{services.base_name} is ready at {address} (its API: {address}/docs)."
        if settings.allows_guests:
            say("clients without a key may generate and train in the project default (SMOLORA_ALLOW_ANONYMOUS=1)")
        elif anonymous is not None:
            where = "on this machine " if is_loopback(settings.host) else ""
            say(f"any client {where}may do everything, until you make a first key ({first_key(settings)})")
        if settings.log_format == "json":
            say(ready)
        else:
            with suppress(OSError):  # the reader may be gone
                typer.echo(f"smolora: {ready}")
                typer.echo("Try, in another terminal:")
                for line in prompts:
                    typer.echo(f"  {line}")
        if anonymous is not None and has_clients_key:
            say("SMOLORA_API_KEY is what commands send: no API key is asked for, unless SMOLORA_API_KEYS has some")

    supervisor = Supervisor(settings.workers, worker_command(settings.of_a_worker))
    return run(
        app,
        services.engine,
        bound,
        announce,
        supervisor,
        flag,
        settings.trusted_proxies,
        settings,
        services.access.ring.reload,
    )
