"""Bind the server's address, and refuse to serve other machines without keys.

Importing this module is quick, so that errors are reported before slow work begins.
"""

import errno
import math
import shlex
import socket
import time
from typing import Any

from server.config import PREFIX, Settings, is_loopback
from server.errors import StartupError
from server.storage.home import Home
from server.system.messages import program

_RETRY_SECONDS = 0.5  # less than asyncio's own delay
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 not bound here


class Listener(socket.socket):
    """A listening socket on which asyncio accepts several connections in one turn of the event loop.

    If no file descriptor is left, asyncio logs the error and retries after a second. asyncio would do this for
    each further connection that it tries to accept in the same turn. So for a moment after an error, `accept`
    reports that no connection is waiting.
    """

    _failed_at = -math.inf

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raise BlockingIOError if none is waiting, or for a moment after another OSError."""
        if time.monotonic() - self._failed_at < _RETRY_SECONDS:
            raise BlockingIOError
        try:
            return super().accept()
        except BlockingIOError:
            raise
        except OSError:
            self._failed_at = time.monotonic()
            raise


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, which refuses connections until the server listens.

    Raise StartupError if the address can't be bound.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    # Prefer IPv4 for a name with both, such as localhost. Commands and health checks use it.
    found.sort(key=lambda one: one[0] is not socket.AF_INET)
    for family, kind, protocol, _, address in found:
        bound = Listener(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            return bound
        except OSError as error:
            bound.close()
            fault = error
            if error.errno != errno.EADDRNOTAVAIL:  # another machine's address, such as a router's
                break
    raise cannot_listen(host, port, fault)


def url(bound: socket.socket, host: str) -> str:
    """Return the URL at which clients on this machine reach the server, with the actual port of the socket."""
    return url_of(host, bound.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Return the URL at which clients on this machine reach a server.

    If the server listens on all addresses, the URL has the loopback address.
    """
    reached = _LOOPBACK.get(host, host)
    shown = f"[{reached}]" if ":" in reached else reached
    return f"http://{shown}:{port}"


def cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    """Return a StartupError that explains the system's error, and names the settings to change."""
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"port {port} on {host} is taken: stop what listens there, or choose another (SMOLORA_PORT, --port)"
        )
    return StartupError(f"can't listen on {host}, port {port}: {error.strerror or error}")


def refuse_strangers(settings: Settings) -> None:
    """Raise StartupError if other machines could connect without a key, unless the settings allow this."""
    needs_key = settings.api_keys or Home(settings.home).keyed.exists()
    if not (needs_key or settings.allow_anonymous != "0" or is_loopback(settings.host) or _has_keys(settings)):
        raise StartupError(
            f"{settings.host} can be reached from elsewhere: make a key ({first_key(settings)}), "
            f"set {PREFIX}API_KEYS (--api-keys), or serve clients without one: "
            f"{PREFIX}ALLOW_ANONYMOUS=until-keyed (--allow-anonymous) until you make a key, 1 always"
        )


def first_key(settings: Settings) -> str:
    """Return the command that makes a key of this server. It names HOME unless that is the default."""
    is_default = settings.home == Settings.model_fields["home"].default
    return f"{program()} keys create NAME" + ("" if is_default else f" --home {shlex.quote(str(settings.home))}")


def _has_keys(settings: Settings) -> bool:
    """Return whether the settings' PostgreSQL database has API keys. False if they name no database."""
    if settings.database is None:
        return False
    from server.access.keys import Keys
    from server.database import connect

    engine = connect(settings.home, url=settings.database)
    try:
        return Keys(engine, Home(settings.home).keyed).are_there()
    finally:
        engine.dispose()
