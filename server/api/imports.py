"""POST /adapters/{name}/import: publish an adapter from the Hugging Face hub, if a setting allows it."""

from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Annotated, Protocol

from anyio import to_thread
from fastapi import APIRouter, Depends, Path
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.catalog.catalog import Version
from adapters.names import MAX_NAME
from server.api import wire
from server.api.adapters import VersionAnswer
from server.api.deps import Services, ServicesDep
from server.api.openapi import IMPORTS
from server.api.quotas import require_quota, require_space, reserved
from server.api.routes import TRAIN, requires
from server.api.schemas import Body
from server.api.strict_route import StrictRoute
from server.api.uploads import MAX_CONFIG_BYTES
from server.api.zips import MAX_WEIGHTS_BYTES
from server.errors import Forbidden
from server.model.base.hub import HubAdapter, fetch_adapter

router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=StrictRoute)


class ImportBody(Body):
    """POST /adapters/{name}/import."""

    repo_id: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$", description="owner/name")
    revision: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="a commit, tag or branch, pinned to its commit; null: the newest",
    )


class Fetch(Protocol):
    """The signature of `server.model.base.hub.fetch_adapter`, which tests replace."""

    def __call__(
        self,
        repo_id: str,
        revision: str | None,
        directory: FilePath,
        *,
        max_config: int,
        max_weights: int,
        timeout: float,
    ) -> HubAdapter: ...


async def get_fetch() -> Fetch:
    """Return the function that fetches adapters. Tests override this dependency."""
    return fetch_adapter


@router.post(
    "/{name}/import",
    summary="Import from the hub",
    status_code=201,
    response_class=Response,
    responses={201: {"model": VersionAnswer, "description": "Published"}, **IMPORTS},
)
@requires(TRAIN, adds=True)
async def import_adapter(
    services: ServicesDep,
    fetch: Annotated[Fetch, Depends(get_fetch)],
    name: Annotated[str, Path(max_length=4 * MAX_NAME)],
    body: ImportBody,
) -> Response:
    """Import an adapter from the Hugging Face hub as the next version of the name.

    Only its two files are fetched, and they are checked like an upload. `config` says which commit they came
    from.
    """
    if not services.settings.allow_hub_adapters:
        raise Forbidden("imports from the hub are off: SMOLORA_ALLOW_HUB_ADAPTERS=1 allows them")
    await to_thread.run_sync(services.library.check_name, name)
    await to_thread.run_sync(services.library.catalog.check_limits, name)
    require_space(services.settings)
    await to_thread.run_sync(require_quota, services)
    version = await services.limiters.fetching.run(
        services.principal.project, _import, services, fetch, name, body
    )
    headers = {"Location": f"/adapters/{version.name}/{version.version}"}
    return wire.answer(VersionAnswer.of(version, services.engine.stats.resident), 201, headers)


@router.api_route("/{name}/visibility", methods=["GET", "DELETE"], include_in_schema=False)
@router.api_route("/{name}/import", methods=["GET", "DELETE"], include_in_schema=False)
@requires(TRAIN)
async def not_a_version(name: str) -> Response:
    """Answer 405: these words are not versions, though /adapters/{name}/{version} would match them."""
    raise HTTPException(405)


def _import(services: Services, fetch: Fetch, name: str, body: ImportBody) -> Version:
    with TemporaryDirectory(prefix="upload-") as scratch:
        found = fetch(
            body.repo_id,
            body.revision,
            FilePath(scratch),
            max_config=MAX_CONFIG_BYTES,
            max_weights=MAX_WEIGHTS_BYTES,
            timeout=services.settings.request_timeout,
        )
        source = {"source": {"hub": body.repo_id, "revision": found.commit}}
        with reserved(services, len(found.config_json) + found.weights.stat().st_size):
            version = services.library.publish(name, found.config_json, found.weights, source)
    services.audit("adapter.import", f"{name}@{version.version}", {"digest": version.digest, **source})
    return version
