"""All errors that a user may meet, as one tree.

    SmoloraError
    ├── InvalidInput               a user's fault, with the fields at fault (HTTP 422)
    │   ├── InvalidExpression      an adapter expression that does not follow the grammar
    │   └── InvalidAdapter         PEFT files that can't be honoured exactly
    ├── NotFound                   no adapter, version or alias of that name (HTTP 404)
    ├── Conflict                   the name is taken, or something still holds it (HTTP 409)
    ├── CorruptAdapter             stored bytes that no longer match their digest (HTTP 500)
    └── TryAgain                   refused now, welcome later; has `retry_after` (HTTP 429)
        └── Unavailable            nothing can be served now (HTTP 503)
            ├── BytesUnavailable   the object store can't be reached, or fails
            ├── Interrupted        the database went away before anything was changed
            └── InDoubt            it went away as it was told to commit: nobody knows whether it did

`server.errors` adds the branches that concern a running server. One handler in `server.api` turns the
whole tree into HTTP. All of it can be pickled, with its attributes and its cause.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """Advice that is part of an error's message. Clients replace `text` by their own advice for `code`."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


class SmoloraError(Exception):
    """Base class of all errors that smolora raises. `str(error)` is safe to show: no paths, no prompt text."""

    def __init__(self, message: str = "", *, hint: Hint | None = None) -> None:
        """`message` includes the text of `hint`."""
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # An exception's own would call the constructor with the finished message, and drop the cause.
        return _restored, (type(self), self.args, vars(self), _portable(self.__cause__))


@dataclass(frozen=True)
class FieldError:
    """One field at fault: where it is (its last part is the field's name), and what would mend it."""

    loc: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return sentence(self.loc, self.message)


def sentence(loc: Sequence[str | int], message: str) -> str:
    """A field at fault, for people. Within a file the message says where: "line 2: text is missing"."""
    return message if len(loc) > 1 and loc[0] == "file" else f"{'.'.join(map(str, loc))}: {message}"


class InvalidInput(SmoloraError):
    """A request that can't be honoured as it is; `errors` names fields at fault, `num_more` counts the rest."""

    def __init__(self, errors: Sequence[FieldError], num_more: int = 0) -> None:
        if not errors:
            raise ValueError("InvalidInput needs at least one FieldError")
        super().__init__("; ".join([*map(str, errors), *([f"and {num_more} more"] if num_more else [])]))
        self.errors = tuple(errors)
        self.num_more = num_more

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidInput":
        """The common case: one field, one reason."""
        return cls([FieldError((field,), message)])


class InvalidExpression(InvalidInput):
    """An adapter expression that does not follow the grammar of `adapters.expression`."""


class InvalidAdapter(InvalidInput):
    """Adapter files that can't be honoured exactly; `errors` has an entry for every offending key."""


class NotFound(SmoloraError):
    """Nothing of that name is stored."""


class Conflict(SmoloraError):
    """The name is taken, or something still holds what should go."""


class CorruptAdapter(SmoloraError):
    """Stored bytes are missing or no longer match the digest that names them."""


class TryAgain(SmoloraError):
    """Refused now, welcome in `retry_after` seconds."""

    default_message = "try again later"

    def __init__(self, message: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message or self.default_message)
        self.retry_after = retry_after


class Unavailable(TryAgain):
    """Nothing can be served now."""

    default_message = "the server can't take requests now"


class BytesUnavailable(Unavailable):
    """The object store that has the bytes didn't answer in time, or not well."""

    default_message = "the object store can't be reached just now"


class Interrupted(Unavailable):
    """The database can't be reached, or let go of a transaction, of which nothing is left: it may be run again."""

    default_message = "the database can't be reached just now"


class InDoubt(Unavailable):
    """The database went away as it was told to commit, and didn't come back in time to be asked whether it did."""

    default_message = "the database went away: look whether it was done before trying again"


def _restored(
    kind: type[SmoloraError],
    args: tuple[object, ...],
    attributes: Mapping[str, object],
    cause: BaseException | None,
) -> SmoloraError:
    """The error as it was, without its constructor."""
    error = kind.__new__(kind, *args)  # which sets `args`
    vars(error).update(attributes)
    if cause is not None:
        error.__cause__ = cause
    return error


def _portable(cause: BaseException | None) -> BaseException | None:
    """The cause as it can be pickled: one from a library in words, for it may not come out again."""
    if cause is None or isinstance(cause, SmoloraError) or type(cause).__module__ == "builtins":
        return cause
    return RuntimeError(f"{type(cause).__name__}: {cause}")
