"""The root of the exception tree.

    SmoloraError
    ├── InvalidInput               a user's fault, with the fields at fault (HTTP 422)
    │   ├── InvalidExpression      an adapter expression that does not follow the grammar
    │   └── InvalidAdapter         PEFT files that can't be honoured exactly
    ├── NotFound                   no adapter, version or alias of that name (HTTP 404)
    ├── Conflict                   the name is taken, or something still holds it (HTTP 409)
    └── CorruptAdapter             stored bytes that no longer match their digest (HTTP 500)

`server.errors` adds the branches that concern a running server. One handler in `server.api` turns the
whole tree into HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class SmoloraError(Exception):
    """Whatever smolora raises on purpose. `str(error)` is safe to show: no paths, no prompt text."""


@dataclass(frozen=True)
class FieldError:
    """One field at fault: where it is (its last part is the field's name), and what would mend it."""

    loc: tuple[str | int, ...]
    message: str


class InvalidInput(SmoloraError):
    """A request that can't be honoured as it is; `errors` names every field at fault."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        if not errors:
            raise ValueError("InvalidInput needs at least one FieldError")
        super().__init__("; ".join(f"{error.loc[-1]}: {error.message}" for error in errors))
        self.errors = tuple(errors)

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
