"""All errors that users may see, as one tree.

    SmoloraError
    ├── InvalidInput               a mistake in the request, with the fields at fault (HTTP 422)
    │   ├── InvalidExpression      an adapter expression that does not follow the grammar
    │   └── InvalidAdapter         PEFT files whose effect can't be reproduced exactly
    ├── NotFound                   no adapter, version or alias of that name (HTTP 404)
    ├── Conflict                   the name is taken, or what is to be deleted is in use (HTTP 409)
    ├── LimitReached               a limit of the project or the key (HTTP 403)
    ├── CorruptAdapter             stored bytes that no longer match their digest (HTTP 500)
    └── TryAgain                   refused now, accepted later; has `retry_after` (HTTP 429)
        └── Unavailable            nothing can be served now (HTTP 503)
            ├── BytesUnavailable   the object store can't be reached, or fails
            ├── Interrupted        the database connection was lost before anything was changed
            │   └── Silent         the database has not answered for seconds
            └── InDoubt            the connection was lost during a commit, whose outcome is unknown

`server.errors` adds the errors of a running server. One handler in `server.api` turns all of them into HTTP
responses.
Every error can be pickled, with its attributes and its cause.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """Advice that is part of an error's message. `code` names it; a client may replace `text` by its own words."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


class SmoloraError(Exception):
    """Base class of all errors that smolora raises. `str(error)` is safe to show: no paths, no prompt text."""

    reason: str | None = None
    """Why a request is refused, as /metrics and the log name it; None: it isn't counted by its reason."""

    def __init__(self, message: str = "", *, hint: Hint | None = None, reason: str | None = None) -> None:
        """`message` includes the text of `hint`."""
        super().__init__(message)
        self.hint = hint
        if reason is not None:
            self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # Exception.__reduce__ would call the constructor with the finished message, and drop the cause
        return _restored, (type(self), self.args, vars(self), _portable(self.__cause__))


@dataclass(frozen=True)
class FieldError:
    """One field at fault: its path, which ends in the field's name, and a message that says how to fix it."""

    loc: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return sentence(self.loc, self.message)


def sentence(loc: Sequence[str | int], message: str) -> str:
    """Return the message, preceded by the field's path.

    If the fault is within an uploaded file, the path is left out, because the message already names the line.
    """
    return message if len(loc) > 1 and loc[0] == "file" else f"{'.'.join(map(str, loc))}: {message}"


class InvalidInput(SmoloraError):
    """A request with mistakes. `errors` has an entry per mistake; `num_more` counts mistakes without an entry."""

    def __init__(self, errors: Sequence[FieldError], num_more: int = 0) -> None:
        if not errors:
            raise ValueError("InvalidInput needs at least one FieldError")
        super().__init__("; ".join([*map(str, errors), *([f"and {num_more} more"] if num_more else [])]))
        self.errors = tuple(errors)
        self.num_more = num_more

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidInput":
        """Create the error for one field."""
        return cls([FieldError((field,), message)])


class InvalidExpression(InvalidInput):
    """An adapter expression that does not follow the grammar of `adapters.expression`."""


class InvalidAdapter(InvalidInput):
    """Adapter files whose effect in PEFT the server can't reproduce exactly.

    `errors` has an entry for every key at fault.
    """


class NotFound(SmoloraError):
    """Nothing with that name exists."""


class Conflict(SmoloraError):
    """The name is taken, or the object to delete is still in use."""


class LimitReached(SmoloraError):
    """The project or the API key has as much as its limit allows."""

    reason = "limit"


class CorruptAdapter(SmoloraError):
    """Stored bytes are missing or no longer match the digest that names them."""


class TryAgain(SmoloraError):
    """A request that is refused now; the client may retry after `retry_after` seconds."""

    default_message = "try again later"

    def __init__(self, message: str | None = None, retry_after: float = 1.0, *, reason: str | None = None) -> None:
        super().__init__(message or self.default_message, reason=reason)
        self.retry_after = retry_after


class Unavailable(TryAgain):
    """Nothing can be served now."""

    default_message = "the server can't take requests now"


class BytesUnavailable(Unavailable):
    """The object store failed or didn't answer in time."""

    default_message = "the object store can't be reached just now"


class Interrupted(Unavailable):
    """The database can't be reached, or rolled a transaction back. The transaction may be repeated."""

    default_message = "the database can't be reached just now"


class Silent(Interrupted):
    """The database has not answered for seconds, so waiting for it would only cost time."""


class InDoubt(Unavailable):
    """The database connection was lost during a commit. The outcome is unknown."""

    default_message = "the database went away: look whether it was done before trying again"


def _restored(
    kind: type[SmoloraError],
    args: tuple[object, ...],
    attributes: Mapping[str, object],
    cause: BaseException | None,
) -> SmoloraError:
    """Recreate a pickled error without calling its constructor."""
    error = kind.__new__(kind, *args)  # sets `args`
    vars(error).update(attributes)
    if cause is not None:
        error.__cause__ = cause
    return error


def _portable(cause: BaseException | None) -> BaseException | None:
    """Return `cause` if it can be pickled, otherwise an error with the same text."""
    if cause is None or isinstance(cause, SmoloraError) or type(cause).__module__ == "builtins":
        return cause
    return RuntimeError(f"{type(cause).__name__}: {cause}")
