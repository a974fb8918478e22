"""Add the errors of every route to the OpenAPI document that FastAPI derives."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from server.access.principal import SCOPES
from server.api import problems
from server.api.routes import ANY, Routes, Scopes
from server.api.schemas import Problem

Responses = dict[int | str, dict[str, object]]


def _problems(descriptions: Mapping[int, str]) -> Responses:
    return {status: {"model": Problem, "description": text} for status, text in descriptions.items()}


REFUSALS = _problems(
    {
        401: "No valid key",
        404: "Unknown adapter or version",
        409: "An adapter was made for a base of other shapes",
        413: "The body is too large",
        422: "A bad field; `errors[].loc` ends in its name",
        429: "The queue is full; see `Retry-After`",
        503: "Not ready, draining, or the engine is dead; see `Retry-After`",
        504: "It took longer than `SMOLORA_REQUEST_TIMEOUT`",
    }
)
KEYS = _problems({401: "No valid key"})
READY = _problems({503: "Not ready, draining, or the engine is dead; see `Retry-After`"})
READS = _problems({401: "No valid key", 422: "A bad field"})
ADMIN_READS = _problems(
    {401: "No valid key", 403: "The key lacks the scope, or can't give it", 422: "A bad field"}
)
FULL_DISK = _problems({503: "The disk is full, or the server is shutting down; see `Retry-After`"})
"""The errors of every route that writes to the disk."""
ADMIN_LOOKUPS = {**ADMIN_READS, **FULL_DISK, **_problems({404: "Nothing has this id or name"})}
ADMIN_CHANGES = {**ADMIN_READS, **FULL_DISK, **_problems({413: "The body is too large"})}
KEY_CHANGES = {**ADMIN_LOOKUPS, **ADMIN_CHANGES, **_problems({409: "The key is revoked"})}
ADMIN_REMOVALS = {**ADMIN_LOOKUPS, **_problems({409: "It isn't empty; `detail` says what is left"})}
LOOKUPS = _problems({401: "No valid key", 404: "Unknown adapter or version", 422: "A bad field"})
ALIASES = {**LOOKUPS, **FULL_DISK}
DELETES = {**ALIASES, **_problems({409: "An alias, a composition or a job needs it; `detail` names them"})}
DOWNLOADS = {**LOOKUPS, **_problems({409: "A composition has no weights of its own"})}
UNALIASES = {**ALIASES, **_problems({409: "`latest` can only be moved"})}
UPLOADS = FULL_DISK | _problems(
    {
        401: "No valid key",
        409: "A composition has the name",
        413: "The body is too large",
        422: "The adapter can't be applied exactly; `errors` names every key",
    }
)
IMPORTS = {
    **UPLOADS,
    **_problems(
        {
            403: "Imports from the hub are not allowed: see `SMOLORA_ALLOW_HUB_ADAPTERS`",
            404: "The hub has no such repository, revision or file",
            503: "The hub can't be reached, no disk space, or the server is shutting down; see `Retry-After`",
        }
    ),
}
COMPOSITIONS = FULL_DISK | _problems(
    {
        401: "No valid key",
        404: "Unknown adapter or version in the expression",
        409: "An adapter has the name (for a merge: a composition), or a part was made for a base of other shapes",
        422: "A bad field; `errors[].loc` ends in its name",
        429: "Too many jobs haven't ended; see `Retry-After`",
    }
)
SUBMISSIONS = FULL_DISK | _problems(
    {
        401: "No valid key",
        404: "Unknown data set, or unknown adapter in `start_from`",
        409: "A composition has the name, or `start_from` (or the latest to improve) is of another base's shapes",
        413: "The body is too large: larger data goes through POST /datasets",
        422: "A bad field or row; `errors[].loc` ends in its name",
        429: "Too many jobs haven't ended; see `Retry-After`",
    }
)
EVALUATIONS = FULL_DISK | _problems(
    {
        401: "No valid key",
        404: "Unknown data set, adapter or version",
        409: "An adapter was made for a base of other shapes",
        422: "A bad field or row; `errors[].loc` ends in its name",
        429: "Too many jobs haven't ended; see `Retry-After`",
    }
)
JOB_LOOKUPS = _problems({401: "No valid key", 404: "Unknown job", 422: "A bad field"})
JOB_RESULTS = _problems(
    {401: "No valid key", 404: "Unknown job, or it has no such result", 409: "Not in the job's status"}
)
JOB_MOVES = {**JOB_RESULTS, **FULL_DISK}
JOB_REMOVALS = FULL_DISK | _problems({401: "No valid key", 404: "Unknown job", 409: "The job hasn't ended"})
DATASETS = _problems({401: "No valid key", 404: "Unknown data set", 409: "A job that hasn't ended needs it"})
DATASET_UPLOADS = FULL_DISK | _problems(
    {
        401: "No valid key",
        413: "The file is too large",
        422: "Bad lines; `errors[].loc` is file, line, field",
    }
)

_FILE = {"type": "string", "format": "binary"}
UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "adapter_config": {**_FILE, "description": "adapter_config.json"},
                    "adapter_model": {**_FILE, "description": "adapter_model.safetensors"},
                    "archive": {**_FILE, "description": "instead of the two: a zip of both"},
                },
            }
        }
    },
}
"""The body of POST /adapters/{name}. FastAPI can't derive it, since the route reads the form by itself."""

_ROWS_FILE = "a row on each line of a .jsonl file; or a .csv file whose first line names its columns"
DATASET_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {**_FILE, "description": _ROWS_FILE}},
            }
        }
    },
}
"""The body of POST /datasets."""


_REF = "#/components/schemas/"
_BAD_BODIES = {
    "408": "The body made no progress for `SMOLORA_BODY_TIMEOUT` seconds",
    "413": "The body is too large",
    "415": "The body has a `Content-Encoding`, or is JSON in another charset than UTF-8",
}
_NO_PROJECT = "`OpenAI-Project` names no project"
_RATE = "The key or its project has used up its minute; see `Retry-After`"
_FORBIDDEN = "The key lacks the scope, a quota is used up, a foreign `Host` or `Origin`, or a setting rules it out"


_KEY = "key"
_KEY_DESCRIPTION = "An API key, once the server has one. It needs one of the scopes given, or `admin`"


class App(FastAPI):
    """An application whose OpenAPI document describes smolora's errors instead of FastAPI's, and routes' scopes.

    `state.routes` must have the table of its routes.
    """

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            routes: Routes = self.state.routes
            for name, path in schema["paths"].items():
                error = "ErrorAnswer" if name.startswith("/v1/") else "Problem"
                methods = routes.find(re.sub("[{}]", "", name)).methods
                for method, operation in path.items():
                    needs = methods[method.upper()]
                    if needs.scopes is not None:
                        operation["security"] = _security(needs.scopes)
                    counts = method != "get" or needs.counts or needs.is_list
                    _add_errors(operation["responses"], error, counts)
            schema["components"]["securitySchemes"] = {
                _KEY: {"type": "http", "scheme": "bearer", "description": _KEY_DESCRIPTION}
            }
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            self.openapi_schema = schema
        return self.openapi_schema


def _security(scopes: Scopes) -> list[dict[str, list[str]]]:
    """Return an operation's security requirements: one for each scope that opens it, and none without keys."""
    roles: list[list[str]] = [[]] if scopes == ANY else [[scope] for scope in SCOPES if scope in scopes]
    return [*({_KEY: role} for role in roles), {}]


def _add_errors(responses: dict[str, dict[str, Any]], error: str, counts: bool) -> None:
    """Set the schema of an operation's error responses to `error`, and add the errors that all routes share.

    `counts` says whether the operation counts towards rate limits.
    """
    content: dict[str, object] = {"application/json": {"schema": {"$ref": f"{_REF}{error}"}}}
    if "4XX" not in responses:
        responses.setdefault("403", {"description": _FORBIDDEN, "content": dict(content)})
        if "401" in responses:
            responses.setdefault("404", {"description": _NO_PROJECT, "content": dict(content)})
        if "401" in responses and counts:  # requests that count towards the key's rate
            responses.setdefault("429", {"description": _RATE, "content": dict(content)})
        for status, text in _BAD_BODIES.items():  # also of a body that the operation has no use for
            responses.setdefault(status, {"description": text, "content": dict(content)})
    for status, response in responses.items():
        if status[0] in "45" and "application/json" in response.get("content", {}):
            if status == "422":
                response["content"] = dict(content)
            if error == "Problem":
                response["content"][problems.MEDIA_TYPE] = response["content"].pop("application/json")
