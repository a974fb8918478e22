"""Errors of a running server, as branches of the tree in `adapters.errors`.

    SmoloraError
    ├── TryAgain                   from `adapters.errors`, like Unavailable
    │   ├── QueueFull              the queue is full (HTTP 429)
    │   ├── RateLimited            a key or a project has used up its rate (HTTP 429)
    │   └── Unavailable            nothing can be served now (HTTP 503)
    │       ├── Interrupted        from `adapters.errors`, like BytesUnavailable and InDoubt
    │       ├── GenerationTimeout  a generation took too long (HTTP 504)
    │       │   └── ReadTooSlowly  the client read its answer too slowly
    │       ├── NotReady           the model, an engine or the grammar checker isn't ready
    │       ├── Draining           the process is shutting down
    │       └── EngineDead         the engine has failed or hangs; the process will exit
    ├── GenerationFailed           a step of the engine failed for this request alone (HTTP 500)
    ├── PayloadTooLarge            the body is too large (HTTP 413)
    ├── Unauthorized               no valid API key (HTTP 401)
    ├── Forbidden                  a setting, a scope or a quota forbids it (HTTP 403)
    └── StartupError               `smolora serve` can't start (exit code 1)

`str(error)` is safe to show to clients: no paths, no prompt text. The exception is `StartupError`, which names
paths, because only the person at the terminal reads it.
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


REASONS = (
    "queue",
    "not_serving",
    "requests_per_minute",
    "tokens_per_minute",
    "max_jobs",
    "max_bytes",
    "limit",
    "disk",
    "scope",
    "site",
    "wrong_keys",
)
"""The reasons of refusals in /metrics, in addition to the names of lanes and other bounds on concurrent work."""


class QueueFull(TryAgain):
    """The queue is full."""

    default_message = "the queue is full"


class RateLimited(TryAgain):
    """A key or its project has used up its rate. The response `headers` show the limits and what remains."""

    def __init__(self, message: str, retry_after: float, headers: Mapping[str, str], reason: str) -> None:
        super().__init__(message, retry_after, reason=reason)
        self.headers = dict(headers)


class GenerationTimeout(Unavailable):
    """A generation took longer than allowed, and was aborted."""

    default_message = "this took longer than SMOLORA_REQUEST_TIMEOUT"


class ReadTooSlowly(GenerationTimeout):
    """The client read its answer too slowly, so that its output buffer overflowed."""

    default_message = "the answer was read too slowly: ask for fewer logprobs, or read faster"


class NotReady(Unavailable):
    """The model, an engine or the grammar checker isn't ready."""

    default_message = "the server is not ready"
    reason = "not_serving"


class Draining(Unavailable):
    """The server finishes running requests and takes no new ones."""

    default_message = "the server is shutting down"
    reason = "not_serving"


class EngineDead(Unavailable):
    """The engine has failed; the process will exit."""

    default_message = "the engine has stopped"
    reason = "not_serving"


class GenerationFailed(SmoloraError):
    """A step of the engine failed for this request. The engine and other requests continue."""


class PayloadTooLarge(SmoloraError):
    """The request's body is too large."""


class Unauthorized(SmoloraError):
    """The request has no valid API key."""


class Forbidden(SmoloraError):
    """A setting, the key's scopes or a quota forbid the request."""


class StartupError(SmoloraError):
    """The server can't start. The message says in one line why, and how to fix it."""
