"""/projects: the operator's; limits, and the end of one."""

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path
from starlette.responses import Response

from adapters.names import MAX_NAME
from server.api import wire
from server.api.accounts.schemas import ProjectAnswer, ProjectBody, ProjectList
from server.api.deps import ServicesDep
from server.api.openapi import ADMIN_CHANGES, ADMIN_LOOKUPS, ADMIN_READS, ADMIN_REMOVALS
from server.api.routes import ADMIN, requires
from server.api.strict_route import StrictRoute
from server.training.project import refuse_with_uploads

router = APIRouter(prefix="/projects", tags=["access"], route_class=StrictRoute)

Name = Annotated[str, Path(max_length=4 * MAX_NAME)]


@router.get(
    "", summary="List projects", response_class=Response, responses={200: {"model": ProjectList}, **ADMIN_READS}
)
@requires(ADMIN)
async def list_projects(services: ServicesDep) -> Response:
    """List projects by name. One comes to be with its first key, or with its limits."""
    found = await to_thread.run_sync(services.access.projects.list)
    return wire.answer({"projects": [project.to_document() for project in found]})


@router.get(
    "/{project}",
    summary="One project",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_LOOKUPS},
)
@requires(ADMIN)
async def get_project(services: ServicesDep, project: Name) -> Response:
    """Get a project's limits."""
    return wire.answer((await to_thread.run_sync(services.access.projects.get, project)).to_document())


@router.put(
    "/{project}",
    summary="Limit a project",
    response_class=Response,
    responses={200: {"model": ProjectAnswer}, **ADMIN_CHANGES},
)
@requires(ADMIN)
async def put_project(services: ServicesDep, project: Name, body: ProjectBody) -> Response:
    """Set a project's limits, which hold for its keys together; the project is made if need be.

    They take the place of all that it had: what is left out has no limit.
    """
    access, who = services.access, services.principal.key_id
    found = await to_thread.run_sync(lambda: access.projects.put(project, body.quota, who=who))
    return wire.answer(found.to_document())


@router.delete(
    "/{project}",
    summary="Delete a project",
    status_code=204,
    response_class=Response,
    responses=ADMIN_REMOVALS,
)
@requires(ADMIN)
async def delete_project(services: ServicesDep, project: Name) -> Response:
    """Delete a project that has nothing left: no adapter, data set or file, and no job that hasn't ended.

    Its keys are revoked. Jobs that have ended, usage and audit entries stay.
    """
    access, who = services.access, services.principal.key_id
    refuse = partial(refuse_with_uploads, services.storage, services.jobs, project)
    await to_thread.run_sync(lambda: access.projects.delete(project, refuse, who=who))
    await access.ring.refresh()
    return Response(status_code=204)
