"""Where the server listens, and for whom. Quick to import: what can't be is known before anything slow begins."""

import errno
import math
import socket
import time
from typing import Any

from server.config import PREFIX, Settings, is_loopback
from server.errors import StartupError
from server.storage.home import Home
from server.system.messages import program

_RETRY_SECONDS = 0.5  # less than asyncio waits
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 it is what is not shown


class Listener(socket.socket):
    """A listening socket on which asyncio may accept several connections in a turn.

    If no file is left for one, asyncio reports that and tries again after a second, but in the same turn it would
    try, report and plan to try again for each of the others, too.
    """

    _failed_at = -math.inf

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises BlockingIOError if there is none, or for a moment after another OSError."""
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
    """A socket that holds the address, and refuses connections until the server listens. Raises StartupError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    # Of a name with both, such as localhost, IPv4: that is where commands and health checks look for a server.
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
            if error.errno != errno.EADDRNOTAVAIL:  # it is another machine's, say a router's before this one
                break
    raise cannot_listen(host, port, fault)


def url(bound: socket.socket, host: str) -> str:
    """Where the server can be reached from this machine, by the port that the system chose where it was asked."""
    return url_of(host, bound.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Where one can be reached from this machine that listens there.

    One that listens on all addresses does so on the loopback's, too, which a browser can open.
    """
    reached = _LOOPBACK.get(host, host)
    shown = f"[{reached}]" if ":" in reached else reached
    return f"http://{shown}:{port}"


def cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    """The error of the system in the words of the settings."""
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"port {port} on {host} is taken: stop what listens there, or choose another (SMOLORA_PORT, --port)"
        )
    return StartupError(f"can't listen on {host}, port {port}: {error.strerror or error}")


def refuse_strangers(settings: Settings) -> None:
    """Raise StartupError if others could connect and nothing would ask them for a key."""
    needs_key = settings.api_keys or Home(settings.home).keyed.exists()
    if not (needs_key or settings.allow_anonymous != "0" or is_loopback(settings.host) or _has_keys(settings)):
        raise StartupError(
            f"{settings.host} can be reached from elsewhere: make a key ({program()} keys create NAME --home "
            f"{settings.home}), set {PREFIX}API_KEYS (--api-keys), or serve clients without one: "
            f"{PREFIX}ALLOW_ANONYMOUS=until-keyed (--allow-anonymous) until you make a key, 1 always"
        )


def _has_keys(settings: Settings) -> bool:
    """Whether a database elsewhere has some, of which HOME needn't know: any server on it may have made them."""
    if settings.database is None:
        return False
    from server.access.keys import Keys
    from server.database import connect

    engine = connect(settings.home, url=settings.database)
    try:
        return Keys(engine, Home(settings.home).keyed).are_there()
    finally:
        engine.dispose()
