"""/compositions: weighted sums of adapters under a name, and merges, which make new adapters out of several."""

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path
from starlette.responses import Response

from adapters.errors import NotFound
from adapters.expression import parse
from adapters.names import MAX_NAME
from server.api import wire
from server.api.access.quotas import require_room
from server.api.adapters.answers import version_answer
from server.api.adapters.composition_schemas import CompositionBody
from server.api.adapters.merging import FIELD, recipe_of, submit_merge
from server.api.adapters.schemas import VersionAnswer
from server.api.deps import IdempotencyKey, ServicesDep
from server.api.openapi import COMPOSITIONS
from server.api.routes import READ, TRAIN, requires
from server.api.strict_route import StrictRoute
from server.api.train.answers import job_document
from server.api.train.schemas import JobAnswer

router = APIRouter(prefix="/compositions", tags=["adapters"], route_class=StrictRoute)


@router.get("", include_in_schema=False)
@requires(READ)
async def list_compositions() -> Response:
    """Raises NotFound, which says where they are."""
    raise NotFound("compositions are listed with the adapters: GET /adapters")


@router.post(
    "/{name}",
    summary="Name a composition",
    status_code=201,
    response_class=Response,
    responses={
        200: {
            "model": VersionAnswer,
            "description": "The latest version, which is the same already",
        },
        201: {"model": VersionAnswer, "description": "The composition's next version"},
        202: {"model": JobAnswer, "description": "With a `method`: the job that merges; `Location` has its path"},
        **COMPOSITIONS,
    },
)
@requires(TRAIN)
async def compose(
    services: ServicesDep,
    name: Annotated[str, Path(max_length=4 * MAX_NAME)],
    body: CompositionBody,
    key: IdempotencyKey = None,
) -> Response:
    """Store an adapter expression under a name, pinned to the versions that it means now.

    The name then works wherever an adapter's does. Compositions within it are replaced by their parts, and
    none of its parts can be deleted before it. If the latest version has the same parts and weights already, there
    is no new one, and the status is 200. With a `method`, a job merges the parts instead, and publishes
    the result as the next version of the adapter `name`.
    """
    if (recipe := recipe_of(body)) is not None:
        room = partial(require_room, services)
        given = (services.jobs, services.library, name, body, recipe, key, room)
        job = await services.limiters.merging.run(submit_merge, *given)
        return wire.answer(job_document(job), 202, {"Location": f"/train/{job.id}"})
    terms = parse(body.expression, FIELD)
    version, is_new = await to_thread.run_sync(services.library.compose, name, terms, FIELD)
    headers = {"Location": f"/adapters/{version.name}/{version.version}"}
    answer = version_answer(version, services.engine.stats.resident)
    return wire.answer(answer, 201 if is_new else 200, headers)
