"""The principal of a request: found by its API key, then used to resolve names, count usage and limit rates."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from adapters.names import DEFAULT_PROJECT, Viewpoint

Scope = Literal["generate", "train", "metrics", "manage", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "train")
OPERATORS_SCOPES: tuple[Scope, ...] = ("metrics", "admin")
"""The scopes that reach into all projects. Only keys of the default project get them."""

ANONYMOUS = "anonymous"
"""The key id of clients that need no key."""
OPERATOR = "command-line"
"""The key id of commands that read and write HOME directly, without a server."""
OF_SETTING = "env-"
"""Begins the key ids of the keys in API_KEYS."""


@dataclass(frozen=True)
class Quota:
    """The limits of a key, or of all keys of a project together. None means no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, and of answers at their maximum length
    max_jobs: int | None = None  # unfinished jobs
    max_bytes: int | None = None  # stored: adapters, data sets, files, and jobs as `server.jobs.room` counts them
    max_versions: int | None = None  # of adapters and compositions
    max_job_seconds: int | None = None  # the most seconds that one job may run; then it fails
    allow_full: bool | None = None  # whether full fine-tuning is allowed; None: it is

    def with_limits(self, limits: Mapping[str, int | None]) -> "Quota":
        """Return the limits with the given ones instead of the old ones."""
        return Quota(**{**asdict(self), **limits})


LIMITS = tuple(field.name for field in fields(Quota))


@dataclass(frozen=True)
class Principal:
    """A key and the project that it acts for.

    Only a key with the scope `admin` may act for a project that isn't its own.
    """

    project: str
    key_id: str
    scopes: frozenset[Scope]
    quota: Quota = Quota()  # of the key alone
    project_quota: Quota = Quota()
    sees_all: bool = False  # whether it sees other projects' things, too

    @property
    def is_operator(self) -> bool:
        """Return whether the principal may do everything, in all projects."""
        return "admin" in self.scopes

    def may(self, scopes: Iterable[Scope]) -> bool:
        """Return whether the principal has one of the scopes. `admin` includes all scopes."""
        return self.is_operator or not self.scopes.isdisjoint(scopes)

    @property
    def viewpoint(self) -> Viewpoint:
        """Return the project and the rights with which adapters' names are resolved for the principal."""
        return Viewpoint(self.project, self.sees_all, self.key_id)


EVERYBODY = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(SCOPES), sees_all=True)
"""The principal of any client before the first key is made."""
GUEST = Principal(DEFAULT_PROJECT, ANONYMOUS, frozenset(DEFAULT_SCOPES))
"""The principal of a client without a key if ALLOW_ANONYMOUS is 1, even if keys exist. It is never an operator."""
