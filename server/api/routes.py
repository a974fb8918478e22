"""What each route requires of its requests, declared beside the route, and the table of all routes by path.

The edge looks a request's path up in the table before any route sees the request. A route that declares nothing
can't be in the table, so it can't be served either.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute

from server.access.principal import Scope

MAX_JSON_BYTES = 2 << 20
MAX_UPLOAD_BYTES = 256 << 20

Scopes = frozenset[Scope]
READ: Scopes = frozenset({"generate", "train"})
GENERATE: Scopes = frozenset({"generate"})
TRAIN: Scopes = frozenset({"train"})
METRICS: Scopes = frozenset({"metrics"})
ADMIN: Scopes = frozenset({"admin"})
OPEN = None
"""No key is needed."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])
Watcher = Literal["probe", "scraper"]


@dataclass(frozen=True)
class Requirements:
    """What a route requires, and what its body may be."""

    scopes: Scopes | None  # a key needs one of them
    upload: bool  # the body is spooled to disk, and may have MAX_UPLOAD_BYTES
    queued: bool  # requests are refused while the engine's queue is full
    hint: str  # what to do about a body that is too large
    watcher: Watcher | None  # what watches the server by this route: neither logged nor traced


_REQUIREMENTS: dict[Callable[..., object], Requirements] = {}


def requires(
    scopes: Scopes | None,
    *,
    upload: bool = False,
    queued: bool = False,
    hint: str = "",
    watcher: Watcher | None = None,
) -> Callable[[Endpoint], Endpoint]:
    """Declare what an endpoint's routes require. It goes below their decorators."""

    def declare(endpoint: Endpoint) -> Endpoint:
        _REQUIREMENTS[endpoint] = Requirements(scopes, upload, queued, hint, watcher)
        return endpoint

    return declare


def requirements_of(endpoint: Callable[..., object]) -> Requirements:
    """Return what the endpoint declares. Raises KeyError if it declares nothing."""
    return _REQUIREMENTS[endpoint]


@dataclass(frozen=True)
class Resource:
    """The routes of one path; without a template, a path that no route has."""

    template: str = ""  # /adapters/{name}; {name...} takes slashes, too
    methods: Mapping[str, Requirements] = field(default_factory=dict)

    @cached_property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return bool(self.methods) and all(method.scopes is None for method in self.methods.values())

    @cached_property
    def takes_uploads(self) -> bool:
        """Whether bodies are spooled to disk."""
        return any(method.upload for method in self.methods.values())

    @cached_property
    def hint(self) -> str:
        """Return what to do about a body that is too large."""
        return next((method.hint for method in self.methods.values() if method.hint), "")

    @cached_property
    def watcher(self) -> Watcher | None:
        """Return what watches the server by this path."""
        return next((method.watcher for method in self.methods.values()), None)

    def scopes(self, method: str) -> Scopes | None:
        """Return the scopes one of which opens the method, or None if the path has no route.

        A method that the path doesn't have is refused as such, to keys that may use one that it has.
        """
        if not self.methods:
            return None
        if (found := self.methods.get(method)) is not None:
            return found.scopes
        return frozenset().union(*(other.scopes or () for other in self.methods.values()))


NOWHERE = Resource()
_OPEN_FILES: Mapping[str, Requirements] = {"GET": Requirements(OPEN, False, False, "", None)}


class Routes:
    """The resources of all routes. If several templates match a path, the one with fewest parameters wins."""

    def __init__(
        self, routers: Iterable[APIRouter], folders: Iterable[str] = (), files: Iterable[str] = ()
    ) -> None:
        """`folders` and `files` are open paths that no router has. Raises KeyError if a route declares nothing."""
        methods: defaultdict[str, dict[str, Requirements]] = defaultdict(dict)
        self._documented: list[APIRoute] = []
        for route in (route for router in routers for route in router.routes):
            assert isinstance(route, APIRoute)
            template, names = route.path.replace(":path}", "...}"), route.methods or set()
            methods[template].update(dict.fromkeys(names, requirements_of(route.endpoint)))
            if route.include_in_schema:
                self._documented.append(route)
        resources = [Resource(path, of_path) for path, of_path in methods.items()]
        self._folders = {folder: Resource(f"{folder}/{{file...}}", _OPEN_FILES) for folder in folders}
        self._static = {path: Resource(path, _OPEN_FILES) for path in files}
        self._static |= {one.template: one for one in resources if "{" not in one.template}
        self._patterned = [one for one in resources if "{" in one.template]
        self._patterned.sort(key=lambda one: one.template.count("{"))
        patterns = (f"(?P<t{i}>{_pattern(one.template)})" for i, one in enumerate(self._patterned))
        self._any = re.compile("|".join(patterns))

    @property
    def static_paths(self) -> Iterable[str]:
        """The paths that have no parameters."""
        return self._static.keys()

    def find(self, path: str) -> Resource:
        """Return the path's resource, or NOWHERE. It takes microseconds."""
        if (found := self._static.get(path)) is not None:
            return found
        for folder, files in self._folders.items():
            if path.startswith(f"{folder}/"):
                return files
        match = self._any.fullmatch(path)
        return NOWHERE if match is None else self._patterned[int(str(match.lastgroup)[1:])]

    def methods(self, path: str) -> frozenset[str]:
        """Return the documented methods of a path: those of all templates that match it equally well."""
        matching = [route for route in self._documented if route.path_regex.match(path)]
        fewest = min((len(route.param_convertors) for route in matching), default=0)
        return frozenset().union(*(r.methods or () for r in matching if len(r.param_convertors) == fewest))


def _pattern(template: str) -> str:
    return re.sub(r"\{\w+\}", "[^/]+", re.sub(r"\{\w+\.\.\.\}", ".+", template))
