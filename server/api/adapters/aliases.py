"""/adapters/{name}/aliases: names for versions that move atomically; moving `latest` back is the rollback.

And /adapters/{name}/visibility: who may use the name.
"""

from functools import partial
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Path
from pydantic import Field
from starlette.responses import Response

from adapters.names import MAX_NAME
from server.api import wire
from server.api.adapters.answers import adapter_answer
from server.api.adapters.schemas import AdapterAnswer
from server.api.deps import ServicesDep
from server.api.openapi import ALIASES, DELETES, UNALIASES
from server.api.routes import TRAIN, requires
from server.api.schemas import Body
from server.api.strict_route import StrictRoute

router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=StrictRoute)

Name = Annotated[str, Path(max_length=4 * MAX_NAME)]


class AliasBody(Body):
    """PUT /adapters/{name}/aliases/{alias}."""

    version: int = Field(ge=1, description="the one that the alias means from now on")


@router.put(
    "/{name}/aliases/{alias}",
    summary="Set an alias",
    response_class=Response,
    responses={200: {"model": AdapterAnswer}, **ALIASES},
)
@requires(TRAIN)
async def put_alias(services: ServicesDep, name: Name, alias: Name, body: AliasBody) -> Response:
    """Point an alias at a version, creating the alias if need be.

    `latest` is an alias too: moving it back is a rollback.

    Requests that were already accepted keep the version that the alias meant then.
    """
    deed = partial(services.library.point, name, alias, body.version)
    target, detail = f"{name}@{alias}", {"version": body.version}
    adapter = await to_thread.run_sync(services.audited, "alias.set", target, deed, detail)
    return wire.answer(adapter_answer(adapter, services.engine.stats.resident))


@router.delete(
    "/{name}/aliases/{alias}",
    summary="Remove an alias",
    status_code=204,
    response_class=Response,
    responses=UNALIASES,
)
@requires(TRAIN)
async def delete_alias(services: ServicesDep, name: Name, alias: Name) -> Response:
    """Delete an alias; its version stays. `latest` can be moved but not deleted."""
    deed = partial(services.library.unpoint, name, alias)
    await to_thread.run_sync(services.audited, "alias.delete", f"{name}@{alias}", deed)
    return Response(status_code=204)


class VisibilityBody(Body):
    """PUT /adapters/{name}/visibility."""

    visibility: Literal["public", "private"] = Field(description="public: other projects may use it")


@router.put(
    "/{name}/visibility",
    summary="Set the visibility",
    response_class=Response,
    responses={200: {"model": AdapterAnswer}, **DELETES},
)
@requires(TRAIN)
async def put_visibility(services: ServicesDep, name: Name, body: VisibilityBody) -> Response:
    """Let other projects use an adapter or composition, as `project/name`, or no longer.

    All of its versions, now and later. A composition can be public only when its parts are.
    """
    deed = partial(services.library.set_visibility, name, body.visibility == "public")
    adapter = await to_thread.run_sync(services.audited, f"adapter.{body.visibility}", name, deed)
    return wire.answer(adapter_answer(adapter, services.engine.stats.resident))
