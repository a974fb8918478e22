"""Requirements that routes declare with `@requires`, and the table of all routes by path.

`Edge` looks up a request's path in the table before any route sees the request. Building the table fails if a
route declares no requirements, so such a route is never served.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute

from server.access.principal import SCOPES, Scope

MAX_JSON_BYTES = 2 << 20
MAX_UPLOAD_BYTES = 256 << 20
LIST_BYTES = 256 << 10

Scopes = frozenset[Scope]
READ: Scopes = frozenset({"generate", "train"})
GENERATE: Scopes = frozenset({"generate"})
TRAIN: Scopes = frozenset({"train"})
METRICS: Scopes = frozenset({"metrics"})
MANAGE: Scopes = frozenset({"manage"})
ADMIN: Scopes = frozenset({"admin"})
ANY: Scopes = frozenset(SCOPES)
OPEN = None
"""The `scopes` of routes that need no key."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])
Watcher = Literal["probe", "scraper"]


@dataclass(frozen=True)
class Requirements:
    """What a route requires of requests. Declare it with `@requires(…)` below the route's decorator."""

    scopes: Scopes | None  # a key needs one of them; None: no key is needed
    upload: bool = False  # the body is spooled to disk, and may be up to MAX_UPLOAD_BYTES long
    queued: bool = False  # requests are refused while the engine's queue is full
    adds: bool = False  # a repeated request adds one more thing, and Idempotency-Key is refused
    counts: bool = False  # it counts as a request, though it is a GET
    is_list: bool = False  # each LIST_BYTES of an answer count as a request
    hint: str = ""  # advice in errors about a body that is too large
    watcher: Watcher | None = None  # who polls this route; its requests are neither logged nor traced

    @property
    def administers(self) -> bool:
        """Return whether only managers and operators may use the route."""
        return self.scopes is not None and self.scopes <= MANAGE | ADMIN

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        DECLARED[endpoint] = self
        return endpoint


requires = Requirements
DECLARED: dict[Callable[..., object], Requirements] = {}
"""The requirements of each endpoint."""


@dataclass(frozen=True)
class Resource:
    """The routes of one path template, such as /adapters/{name}. A parameter {name...} also matches slashes."""

    template: str
    methods: Mapping[str, Requirements]
    all: Requirements  # of all methods together, for requests with a method that the path doesn't have

    @classmethod
    def of(cls, template: str, methods: Mapping[str, Requirements]) -> "Resource":
        each = methods.values()
        is_open = all(one.scopes is None for one in each)
        together = Requirements(
            OPEN if is_open else frozenset().union(*(one.scopes or () for one in each)),
            upload=any(one.upload for one in each),
            hint=next((one.hint for one in each if one.hint), ""),
            watcher=next((one.watcher for one in each), None),
        )
        return cls(template, methods, together)

    @property
    def is_open(self) -> bool:
        return self.all.scopes is None


NOWHERE = Resource("", {}, Requirements(frozenset()))
"""The resource of paths without a route."""
_OPEN_FILES = {"GET": Requirements(OPEN)}


class Routes:
    """The resources of all routes. If several templates match a path, the one with the fewest parameters wins."""

    def __init__(
        self, routers: Iterable[APIRouter], folders: Iterable[str] = (), files: Iterable[str] = ()
    ) -> None:
        """`folders` and `files` are paths that need no key and aren't in `routers`.

        Raise KeyError if a route declares no requirements.
        """
        methods: defaultdict[str, dict[str, Requirements]] = defaultdict(dict)
        self._documented: list[APIRoute] = []
        for route in (route for router in routers for route in router.routes):
            assert isinstance(route, APIRoute)
            template, names = route.path.replace(":path}", "...}"), route.methods or set()
            methods[template].update(dict.fromkeys(names, DECLARED[route.endpoint]))
            if route.include_in_schema:
                self._documented.append(route)
        resources = [Resource.of(template, found) for template, found in methods.items()]
        self._folders = {folder: Resource.of(f"{folder}/{{file...}}", _OPEN_FILES) for folder in folders}
        self._static = {path: Resource.of(path, _OPEN_FILES) for path in files}
        self._static |= {one.template: one for one in resources if "{" not in one.template}
        self._patterned = [one for one in resources if "{" in one.template]
        self._patterned.sort(key=lambda one: one.template.count("{"))
        patterns = (f"(?P<t{i}>{_pattern(one.template)})" for i, one in enumerate(self._patterned))
        self._any = re.compile("|".join(patterns))
        for path, fixed in self._static.items():  # routers pass PATCH /keys/self to PATCH /keys/{key_id}
            if (match := self._any.fullmatch(path)) is not None:
                pattern = self._patterned[int(str(match.lastgroup)[1:])]
                self._static[path] = Resource.of(path, {**pattern.methods, **fixed.methods})

    @property
    def static_paths(self) -> Iterable[str]:
        """All paths without parameters."""
        return self._static.keys()

    def find(self, path: str) -> Resource:
        """Return the path's resource, or NOWHERE if the path has no route."""
        if (found := self._static.get(path)) is not None:
            return found
        for folder, files in self._folders.items():
            if path.startswith(f"{folder}/"):
                return files
        match = self._any.fullmatch(path)
        return NOWHERE if match is None else self._patterned[int(str(match.lastgroup)[1:])]

    def methods(self, path: str) -> frozenset[str]:
        """Return the methods that the API's documentation has for a path.

        If the path matches several templates, only those with the fewest parameters count.
        """
        matching = [route for route in self._documented if route.path_regex.match(path)]
        fewest = min((len(route.param_convertors) for route in matching), default=0)
        return frozenset().union(*(r.methods or () for r in matching if len(r.param_convertors) == fewest))


def _pattern(template: str) -> str:
    return re.sub(r"\{\w+\}", "[^/]+", re.sub(r"\{\w+\.\.\.\}", ".+", template))
