"""Queries are as closed as bodies: a route refuses a parameter that it doesn't declare, or that comes twice.

Else a misspelt one would be ignored: `POST /train?dryrun=true` would queue a job.
"""

from fastapi import Request
from fastapi.routing import APIRoute

from adapters.errors import FieldError, InvalidInput
from adapters.names import near
from server.api.errors.problems import MAX_ERRORS, MAX_NAME

KEYED = {"x-keys": True}
"""`json_schema_extra` of a parameter that may also come as `name[key]`, as OpenAI's client sends objects."""


async def closed_query(request: Request) -> None:
    """Raise InvalidInput if the query has a parameter that the route doesn't declare, or one twice.

    Pages take any query, since links to them get parameters from elsewhere. It awaits nothing: FastAPI would send
    an ordinary function to a thread.
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
    """Return the names of the endpoint's query parameters, and whether each may come as `name[key]`."""
    return {field.alias: field.field_info.json_schema_extra == KEYED for field in route.dependant.query_params}
