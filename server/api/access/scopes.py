"""Which scopes open which route. A route that isn't here is the operator's alone.

`tests/server/api/access/test_scopes.py` holds the table to the OpenAPI document: every route is in it, once.
"""

import re

from server.access.principal import Scope
from server.api.access.sites import PROBES

Scopes = frozenset[Scope]

READ: Scopes = frozenset({"generate", "train"})
GENERATE: Scopes = frozenset({"generate"})
TRAIN: Scopes = frozenset({"train"})
METRICS: Scopes = frozenset({"metrics"})
ADMIN: Scopes = frozenset({"admin"})

_OPEN = PROBES | {"/", "/docs", "/redoc", "/openapi.json"}
"""What is answered without a key, with all below these."""
_BELOW = ("/docs/", "/web/")

_ROUTES: tuple[tuple[str, str, Scopes], ...] = (
    ("POST", "/generate", GENERATE),
    ("POST", "/compare", GENERATE),
    ("POST", "/v1/chat/completions", GENERATE),
    ("POST", "/v1/completions", GENERATE),
    ("GET", "/adapters", READ),
    ("GET", "/adapters/{name}", READ),
    ("GET", "/adapters/{name}/{version}", READ),
    ("GET", "/v1/models", READ),
    ("GET", "/v1/models/{model...}", READ),
    ("GET", "/usage", READ),
    ("GET", "/metrics", METRICS),
    ("POST", "/train", TRAIN),
    ("GET", "/train", TRAIN),
    ("GET DELETE", "/train/{job_id}", TRAIN),
    ("GET", "/train/{job_id}/events", TRAIN),
    ("GET", "/train/{job_id}/report", TRAIN),
    ("GET", "/train/{job_id}/download", TRAIN),
    ("POST", "/train/{job_id}/cancel", TRAIN),
    ("POST", "/train/{job_id}/pause", TRAIN),
    ("POST", "/train/{job_id}/resume", TRAIN),
    ("GET POST", "/datasets", TRAIN),
    ("GET DELETE", "/datasets/{dataset_id}", TRAIN),
    ("POST DELETE", "/adapters/{name}", TRAIN),
    ("DELETE", "/adapters/{name}/{version}", TRAIN),
    ("GET", "/adapters/{name}/{version}/download", TRAIN),
    ("POST", "/adapters/{name}/import", TRAIN),
    ("PUT DELETE", "/adapters/{name}/aliases/{alias}", TRAIN),
    ("PUT", "/adapters/{name}/visibility", TRAIN),
    ("GET", "/compositions", READ),
    ("POST", "/compositions/{name}", TRAIN),
    ("DELETE", "/v1/models/{model...}", TRAIN),
    ("GET POST", "/v1/files", TRAIN),
    ("GET DELETE", "/v1/files/{file_id}", TRAIN),
    ("GET", "/v1/files/{file_id}/content", TRAIN),
    ("GET POST", "/v1/fine_tuning/jobs", TRAIN),
    ("GET", "/v1/fine_tuning/jobs/{job_id}", TRAIN),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events", TRAIN),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints", TRAIN),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel", TRAIN),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause", TRAIN),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume", TRAIN),
    ("GET POST", "/keys", ADMIN),
    ("DELETE", "/keys/{key_id}", ADMIN),
    ("GET", "/projects", ADMIN),
    ("GET PUT DELETE", "/projects/{project}", ADMIN),
    ("GET", "/audit", ADMIN),
)


def _pattern(template: str) -> str:
    parts = re.split(r"(\{\w+(?:\.\.\.)?\})", template)
    return "".join(
        (".+" if part.endswith("...}") else "[^/]+") if part.startswith("{") else re.escape(part) for part in parts
    )


def _table() -> tuple[tuple[re.Pattern[str], dict[str, Scopes]], ...]:
    """Paths, the most literal first, each with its methods."""
    found: dict[str, dict[str, Scopes]] = {}
    for methods, template, scopes in _ROUTES:
        for method in methods.split():
            found.setdefault(template, {})[method] = scopes
    templates = sorted(found, key=lambda template: template.count("{"))
    return tuple((re.compile(_pattern(template)), found[template]) for template in templates)


_TABLE = _table()

_STATIC = {template: template for template in (*_OPEN, *(t for _, t, _ in _ROUTES if "{" not in t))}
STATIC_PATHS = tuple(_STATIC)
"""Paths of routes, those without anything in braces."""
_PATTERNED = [template for template in dict.fromkeys(t for _, t, _ in _ROUTES) if "{" in template]
_PATTERNED.sort(key=lambda template: template.count("{"))
_ANY = re.compile("|".join(f"(?P<t{i}>{_pattern(template)})" for i, template in enumerate(_PATTERNED)))


def is_open(path: str) -> bool:
    """Whether everybody may have it."""
    return path in _OPEN or path.startswith(_BELOW)


def template_of(path: str) -> str | None:
    """The route that the path is of, without what is in its braces; None where it is of none. Microseconds."""
    if (template := _STATIC.get(path)) is not None:
        return template
    if path.startswith(_BELOW):
        return f"{path[: path.index('/', 1)]}/{{file...}}"
    found = _ANY.fullmatch(path)
    return _PATTERNED[int(str(found.lastgroup)[1:])] if found else None


def scopes_of(method: str, path: str) -> Scopes | None:
    """One of which opens the route; None where there is no such path, for whoever isn't the operator.

    A path that has no such method says so itself, to whoever may use one of those that it has.
    """
    for pattern, methods in _TABLE:
        if pattern.fullmatch(path):
            return methods.get(method) or frozenset().union(*methods.values())
    return None
