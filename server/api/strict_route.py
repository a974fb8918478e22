"""Read queries and JSON bodies strictly.

A query parameter that the route doesn't declare, or that comes twice, is refused. Otherwise a typo such
as `POST /train?dryrun=true` would queue a job.

Python's JSON parser accepts lone surrogates, bytes that aren't UTF-8 and any depth of nesting. Here, such
bodies are refused as malformed. NaN and infinities are parsed, so that the schemas can refuse them by field.
"""

import gc
import json
from collections.abc import Callable, Coroutine

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.errors import FieldError, InvalidInput
from adapters.names import near
from server.api.problems import MAX_ERRORS, MAX_NAME
from server.api.routes import DECLARED

KEYED = {"x-keys": True}
"""Marks a query parameter that may also be sent as `name[key]`, which is how OpenAI's client sends objects."""


async def closed_query(request: Request) -> None:
    """Raise InvalidInput if the query has a parameter that the route doesn't declare, or has a parameter twice.

    The routes of web pages accept any query, since other sites add parameters to links. This is a coroutine
    because FastAPI runs ordinary functions in a thread.
    """
    route = request.scope.get("route")
    if not request.scope["query_string"] or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    declared = _declared(route)
    seen = set[str]()
    faults: dict[FieldError, None] = {}
    for name, _ in request.query_params.multi_items():
        is_keyed = name.endswith("]") and declared.get(name.partition("[")[0], False)
        if name not in declared and not is_keyed:
            meant = near(name, declared) if len(faults) < MAX_ERRORS else None
            message = "no such parameter" + (f": did you mean {meant}?" if meant else "")
            faults[FieldError((name[:MAX_NAME],), message)] = None
        elif name in seen:
            faults[FieldError((name[:MAX_NAME],), "must be given once")] = None
        seen.add(name)
    if faults:
        raise InvalidInput(list(faults)[:MAX_ERRORS], max(0, len(faults) - MAX_ERRORS))


def _declared(route: APIRoute) -> dict[str, bool]:
    """Return the names of the endpoint's query parameters, and whether each may be sent as `name[key]`."""
    return {field.alias: field.field_info.json_schema_extra == KEYED for field in route.dependant.query_params}


CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
"""The accepted charsets: UTF-8, in which JSON must be encoded (RFC 8259), and its subset ASCII."""

MAX_CONTAINERS = 100_000
MAX_FIELDS = 100_000
MAX_VALUES = 500_000
"""Limits on the values in one body. Parsing more values would block the event loop for over 50 ms. Even a body
of 2 MiB has fewer values if it is made of ordinary rows or token ids."""


class StrictRequest(Request):
    """A request whose `json` uses pydantic's parser."""

    async def json(self) -> object:
        """Parse the body.

        Raise HTTPException (415 if Content-Type names another charset, 413 if the body has too many values) or
        JSONDecodeError.
        """
        body = await self.body()
        _, parameters = parse_options_header(self.headers.get("content-type"))
        if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
            raise HTTPException(415, "JSON must be UTF-8: send it so, and leave charset out of Content-Type")
        check_shape(body, DECLARED[self.scope["endpoint"]].hint)
        is_collecting = gc.isenabled()
        gc.disable()  # the collector would walk through the growing result again and again
        try:
            parsed: object = from_json(body, allow_inf_nan=True)
        except ValueError as error:  # the message has a line and column, and doesn't quote the body
            raise json.JSONDecodeError(str(error), "", 0) from None
        finally:
            if is_collecting:
                gc.enable()
        return parsed


def check_shape(body: bytes, hint: str = "") -> None:
    """Raise HTTPException (413) if a JSON body has too many values to be parsed. The message ends with `hint`."""
    if len(body) <= MAX_FIELDS:
        return
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    hint = hint and f"; {hint}"
    _check("strings", text.count(b'"') // 2, MAX_VALUES, hint)
    outside = b"".join(text.split(b'"')[::2])  # without strings
    _check("arrays and objects", outside.count(b"[") + outside.count(b"{"), MAX_CONTAINERS, hint)
    _check("fields", outside.count(b":"), MAX_FIELDS, hint)
    _check("values", outside.count(b",") + 1, MAX_VALUES, hint)


def _check(what: str, count: int, most: int, hint: str) -> None:
    if count > most:
        raise HTTPException(413, f"the body has {count:,} {what}, and may have {most:,}{hint}")


class StrictRoute(APIRoute):
    """A route that reads its body as a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict
