"""The principal of a request: made from the request's key on arrival, then used to resolve names, count usage and
limit rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from adapters.names import DEFAULT_PROJECT, Viewpoint

Scope = Literal["generate", "train", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "train")

ANONYMOUS = "anonymous"
"""The key id of clients that need no key."""
OPERATOR = "command-line"
"""The key id of commands that work on HOME directly."""


@dataclass(frozen=True)
class Quota:
    """The limits of a key, or of a project's keys together. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, and of answers at their maximum length
    max_jobs: int | None = None  # unfinished jobs
    max_bytes: int | None = None  # stored: adapters, data sets, files


LIMITS = tuple(field.name for field in fields(Quota))


@dataclass(frozen=True)
class Principal:
    """A key and the project that it acts for. Without the scope `admin` it sees only that project's things."""

    project: str
    key_id: str
    scopes: frozenset[Scope]
    quota: Quota = Quota()  # of the key alone
    project_quota: Quota = Quota()
    sees_all: bool = False  # whether it sees other projects' things, too

    @property
    def is_operator(self) -> bool:
        """Return whether it may do everything, in all projects."""
        return "admin" in self.scopes

    def may(self, scopes: Iterable[Scope]) -> bool:
        """Return whether the principal has one of the scopes; `admin` includes all."""
        return self.is_operator or not self.scopes.isdisjoint(scopes)

    @property
    def viewpoint(self) -> Viewpoint:
        """Return the viewpoint from which names are resolved."""
        return Viewpoint(self.project, self.sees_all, self.key_id)


EVERYBODY = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(SCOPES), sees_all=True)
"""Any client before the first key is made."""
GUEST = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(DEFAULT_SCOPES))
"""A client without a key under `ALLOW_ANONYMOUS=1`, even if there are keys. It is never the operator."""
