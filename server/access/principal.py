"""Who asks: made of a request's key at the edge, and carried to whatever resolves names, counts or limits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from adapters.names import DEFAULT_PROJECT, Viewpoint

Scope = Literal["generate", "train", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "train")

ANONYMOUS = "anonymous"
"""In the place of a key's id where no key is needed."""
OPERATOR = "command-line"
"""Likewise, of whoever works on HOME itself."""


@dataclass(frozen=True)
class Quota:
    """How much a key may, or a project's keys together. None: as much as the server can."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, and of answers as long as they may become
    max_jobs: int | None = None  # that haven't ended
    max_bytes: int | None = None  # stored: adapters, data sets, files


LIMITS = tuple(field.name for field in fields(Quota))


@dataclass(frozen=True)
class Principal:
    """A project, on whose behalf a key acts. Without the scope `admin` it sees what is its project's alone."""

    project: str
    key_id: str
    scopes: frozenset[Scope]
    quota: Quota = Quota()  # the key's
    project_quota: Quota = Quota()
    sees_all: bool = False  # other projects' things, too

    @property
    def is_operator(self) -> bool:
        """Whether it may do everything, in all projects."""
        return "admin" in self.scopes

    def may(self, scopes: Iterable[Scope]) -> bool:
        """Whether it has one of the scopes; `admin` stands for all."""
        return self.is_operator or not self.scopes.isdisjoint(scopes)

    @property
    def viewpoint(self) -> Viewpoint:
        """The project as names are resolved for it."""
        return Viewpoint(self.project, self.sees_all, self.key_id)


EVERYBODY = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(SCOPES), sees_all=True)
"""Any client until a first key is made."""
GUEST = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(DEFAULT_SCOPES))
"""A client without a key under `ALLOW_ANONYMOUS=1`, whether or not there are keys: never the operator."""
