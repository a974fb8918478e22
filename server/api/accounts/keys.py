"""/keys: made, listed and revoked by the operator."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from adapters.errors import InvalidInput
from adapters.names import MAX_NAME
from adapters.viewpoint import DEFAULT_PROJECT
from server.access.keys import ApiKey
from server.api import wire
from server.api.access.authentication import PROJECT_HEADER
from server.api.accounts.schemas import KeyAnswer, KeyBody, KeyList, NewKeyAnswer
from server.api.deps import Services, ServicesDep
from server.api.openapi import ADMIN_CHANGES, ADMIN_LOOKUPS, ADMIN_READS
from server.api.routes import ADMIN, requires
from server.api.strict_route import StrictRoute
from server.training.queue.reserve import Reserve

router = APIRouter(prefix="/keys", tags=["access"], route_class=StrictRoute)


@router.post(
    "",
    summary="Make a key",
    status_code=201,
    response_class=Response,
    responses={201: {"model": NewKeyAnswer, "description": "The key, and its secret, once"}, **ADMIN_CHANGES},
)
@requires(ADMIN)
async def create_key(
    body: KeyBody,
    services: ServicesDep,
    at_work_in: Annotated[str | None, Header(alias=PROJECT_HEADER, description="the default of `project`")] = None,
) -> Response:
    """Make a key of a project. The answer has its secret, which can't be asked for again.

    From the first key on clients need one; with SMOLORA_ALLOW_ANONYMOUS=1 only beyond generate and train.
    """
    key, secret = await to_thread.run_sync(_create, services, body, at_work_in)
    return wire.answer({**key.to_document(), "secret": secret}, 201, {"Cache-Control": "no-store"})


@router.get("", summary="List keys", response_class=Response, responses={200: {"model": KeyList}, **ADMIN_READS})
@requires(ADMIN)
async def list_keys(
    services: ServicesDep,
    project: Annotated[str | None, Query(max_length=4 * MAX_NAME, description="only its")] = None,
) -> Response:
    """List keys, the oldest first; those that were revoked or have expired, too. Secrets are not stored."""
    found = await to_thread.run_sync(services.access.keys.list, project)
    return wire.answer({"keys": [key.to_document() for key in found]})


@router.delete(
    "/{key_id}",
    summary="Revoke a key",
    response_class=Response,
    responses={200: {"model": KeyAnswer}, **ADMIN_LOOKUPS},
)
@requires(ADMIN)
async def revoke_key(services: ServicesDep, key_id: Annotated[str, Path(max_length=256)]) -> Response:
    """Revoke a key, at once: streams that it has open end, too. Repeating it gives the same answer."""
    key = await to_thread.run_sync(_revoke, services, key_id)
    await services.access.ring.refresh()
    return wire.answer(key.to_document())


def _revoke(services: Services, key_id: str) -> ApiKey:
    """On a full disk, too, which whoever has the key may have filled."""
    reserve = Reserve(services.settings.home)
    key = reserve.spend_on(lambda: services.access.keys.revoke(key_id, who=services.principal.key_id))
    reserve.fill()
    return key


def _create(services: Services, body: KeyBody, at_work_in: str | None) -> tuple[ApiKey, str]:
    if None not in (body.project, at_work_in) and body.project != at_work_in:
        raise InvalidInput.of("project", "contradicts the header OpenAI-Project: leave one of them out")
    if body.expires_at is not None and body.expires_at.tzinfo is None:
        raise InvalidInput.of("expires_at", "must have an offset from UTC, such as 2027-01-01T00:00:00Z")
    return services.access.keys.create(
        body.name,
        who=services.principal.key_id,
        project=body.project or at_work_in or DEFAULT_PROJECT,
        scopes=body.scopes,
        expires_at=body.expires_at,
        quota=body.quota,
    )
