"""/v1/models: the base, adapters and compositions. DELETE works like DELETE /adapters."""

from datetime import datetime
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path
from starlette.responses import Response

from adapters.errors import InvalidInput, NotFound
from adapters.expression import MAX_LENGTH
from adapters.names import split_key
from server.api import wire
from server.api.deps import Services, ServicesDep
from server.api.openai.calls import terms_of
from server.api.openai.schemas import REFUSALS
from server.api.problems import ModelNotFound
from server.api.routes import READ, TRAIN, requires

router = APIRouter(prefix="/v1", tags=["openai"])

OWNER = "smolora"


@router.get("/models", summary="List models", response_class=Response, responses=REFUSALS)
@requires(READ, is_list=True)
async def models(services: ServicesDep) -> Response:
    """List the base, adapters and compositions.

    Each can be used as `model`, and so can every adapter expression.
    """
    dates = await to_thread.run_sync(services.library.catalog.latest_dates)
    listed = [_adapter(services, name, created_at) for name, created_at in dates.items()]
    return wire.answer({"object": "list", "data": [_base(services), *listed]})


@router.get("/models/{model:path}", summary="One model", response_class=Response, responses=REFUSALS)
@requires(READ)
async def model(model: Annotated[str, Path(max_length=MAX_LENGTH)], services: ServicesDep) -> Response:
    """Get the base, or the adapters that an expression names at present."""
    terms = terms_of(services, model)
    if not terms:
        return wire.answer(_base(services))

    try:
        versions = await to_thread.run_sync(services.library.named, terms, "model")
    except NotFound as error:
        raise ModelNotFound(str(error)) from None
    return wire.answer(_adapter(services, model, max(version.created_at for version in versions)))


@router.delete("/models/{model:path}", summary="Delete a model", response_class=Response, responses=REFUSALS)
@requires(TRAIN)
async def delete(model: Annotated[str, Path(max_length=MAX_LENGTH)], services: ServicesDep) -> Response:
    """Delete an adapter or composition by name, or one version, as in `tweets@3`.

    Running requests finish with it.
    """
    terms = terms_of(services, model)
    if len(terms) != 1 or str(terms[0]) != model or terms[0].alias is not None or terms[0].weight != 1:
        raise InvalidInput.of("model", "can only be deleted by an adapter's name, or name@version")
    name, version = terms[0].name, terms[0].version
    library = services.library
    deed = partial(library.delete, name) if version is None else partial(library.delete_version, name, version)
    project, own = split_key(services.principal.viewpoint.key(name))
    target = own if version is None else f"{own}@{version}"
    try:
        await to_thread.run_sync(services.audited, "adapter.delete", target, deed, None, project)
    except NotFound as error:
        raise ModelNotFound(str(error)) from None
    return wire.answer({"id": model, "object": "model", "deleted": True})


def _base(services: Services) -> dict[str, object]:
    return _document(services.base_name, 0)


def _adapter(services: Services, name: str, created_at: datetime) -> dict[str, object]:
    return _document(name, int(created_at.timestamp()), parent=services.base_name)


def _document(name: str, created: int, **more: object) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER, **more}
