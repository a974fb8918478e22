"""Where the server listens. Quick to import, so that a taken port is known before anything slow begins."""

import errno
import socket

from server.errors import StartupError


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, and refuses connections until the server listens. Raises StartupError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from None
    return bound


def url(bound: socket.socket, host: str) -> str:
    """Where the server can be reached, with the port that the system chose where it was asked to."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"


def cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    """The error of the system in the words of the settings."""
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"port {port} on {host} is taken: stop what listens there, or choose another (SMOLORA_PORT, --port)"
        )
    return StartupError(f"can't listen on {host}, port {port}: {error.strerror or error}")
