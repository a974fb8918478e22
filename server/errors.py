"""Faults of a running server, as branches of the tree in `adapters.errors`.

    SmoloraError
    ├── TryAgain                   of `adapters.errors`, as Unavailable
    │   ├── QueueFull              as many requests wait as may (HTTP 429)
    │   ├── RateLimited            a key's or a project's minute is used up (HTTP 429)
    │   └── Unavailable            nothing can be served now (HTTP 503)
    │       ├── Interrupted        of `adapters.errors`, as BytesUnavailable and InDoubt
    │       ├── GenerationTimeout  it took too long, and was ended
    │       │   └── ReadTooSlowly  too much of it waited for its reader
    │       ├── NotReady           the model isn't loaded yet
    │       ├── Draining           the process is about to end
    │       └── EngineDead         the engine has failed, or hangs; the process will exit
    ├── GenerationFailed           a step failed under this request; others go on (HTTP 500)
    ├── PayloadTooLarge            the body is bigger than it may be (HTTP 413)
    ├── Unauthorized               no valid API key (HTTP 401)
    ├── Forbidden                  a setting, a scope or a quota rules it out (HTTP 403)
    └── StartupError               `smolora serve` can't start (exit code 1)

Like all of the tree, `str(error)` is safe to show: no paths, no prompt text. `StartupError` is the
exception: only the person at the terminal reads it, so it names paths.
"""

from collections.abc import Mapping

from adapters.errors import Interrupted, SmoloraError, TryAgain, Unavailable

__all__ = [
    "Draining",
    "EngineDead",
    "Forbidden",
    "GenerationFailed",
    "GenerationTimeout",
    "Interrupted",
    "NotReady",
    "PayloadTooLarge",
    "QueueFull",
    "RateLimited",
    "ReadTooSlowly",
    "StartupError",
    "TryAgain",
    "Unauthorized",
    "Unavailable",
]


class QueueFull(TryAgain):
    """As many requests wait as may."""

    default_message = "the queue is full"


class RateLimited(TryAgain):
    """A key, or its project, has had as much as it may have in a minute. `headers` tell how much that is."""

    def __init__(self, message: str, retry_after: float, headers: Mapping[str, str]) -> None:
        super().__init__(message, retry_after)
        self.headers = dict(headers)


class GenerationTimeout(Unavailable):
    """A generation took longer than it may, and was ended."""

    default_message = "this took longer than SMOLORA_REQUEST_TIMEOUT"


class ReadTooSlowly(GenerationTimeout):
    """More of an answer waited for its reader than may, and it was ended."""

    default_message = "the answer was read too slowly: ask for fewer logprobs, or read faster"


class NotReady(Unavailable):
    """The model isn't loaded yet."""

    default_message = "the server is not ready"


class Draining(Unavailable):
    """The process ends what runs and takes nothing new."""

    default_message = "the server is shutting down"


class EngineDead(Unavailable):
    """The engine can't go on; the process will exit."""

    default_message = "the engine has stopped"


class GenerationFailed(SmoloraError):
    """A step failed under this request; the engine and other requests go on."""


class PayloadTooLarge(SmoloraError):
    """The body is bigger than it may be."""


class Unauthorized(SmoloraError):
    """No valid API key came with the request."""


class Forbidden(SmoloraError):
    """A setting of this server, the key's scopes or a quota rule it out."""


class StartupError(SmoloraError):
    """The server can't start: one line that says why and what would mend it."""
