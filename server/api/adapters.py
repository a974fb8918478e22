"""/adapters: list, upload, download and delete adapters, and set their aliases and visibility."""

import re
from collections.abc import Callable, Set
from functools import partial
from io import BytesIO
from typing import Annotated, Literal, Self

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from pydantic import BeforeValidator, Field
from starlette.datastructures import FormData
from starlette.responses import Response

from adapters.catalog.catalog import Adapter, Version
from adapters.errors import NotFound
from adapters.library import NUM_VERSIONS
from adapters.names import MAX_KEY, MAX_NAME, is_name, split_key
from adapters.peft.files import CONFIG_NAME, with_base
from adapters.recorded import FILE_DIGEST
from server.api import wire
from server.api.deps import Services, ServicesDep
from server.api.openapi import ALIASES, DELETES, DOWNLOADS, LOOKUPS, UNALIASES, UPLOAD_BODY, UPLOADS
from server.api.pages import LINK, MAX_ALL, After, AllLimit, link
from server.api.quotas import reserved
from server.api.routes import READ, TRAIN, requires
from server.api.schemas import Answer, Body, Timestamp, UsedAdapter
from server.api.strict_route import StrictRoute
from server.api.uploads import form_bytes, received_form, uploaded_files
from server.api.zips import StoredZip, zip_download
from server.model.base.source import HubModel, is_hub_id
from server.training.model_card import bare_card, model_card


class VersionAnswer(Answer):
    name: str
    version: int
    kind: Literal["adapter", "composition"]
    digest: str
    parts: list[UsedAdapter] | None = Field(
        None, description="only of a composition: its adapters, pinned to versions"
    )
    rank: int = Field(description="of a composition: the sum over its parts")
    alpha: float | None = Field(description="null for a composition")
    target_modules: list[str]
    parameters: int
    bytes: int = Field(description="size in the store; 0 for a composition")
    base_model: str | None = Field(description="the base that its configuration names")
    base_digest: str | None = Field(description="digest of the base that it was trained on or uploaded for")
    data_digest: str | None = Field(description="digest of the rows that it was trained on")
    config: dict[str, object] = Field(description="its shape and how it was made")
    metrics: dict[str, float]
    verdict: str | None = Field(
        description="better, worse or can't tell: its job's comparison with the latest version before it"
    )
    parent: str | None = Field(description="what it was made from, pinned to versions")
    job_id: str | None
    created_at: Timestamp
    resident: bool = Field(description="whether it is in the engine's memory now")
    warnings: list[str] = Field(description="for example that it was made for another base")

    @classmethod
    def of(cls, version: Version, resident: Set[str]) -> Self:
        """Return the description of a version. `resident` has the digests of adapters in the engine's memory."""
        fields = {
            **vars(version),
            "kind": version.kind,
            "verdict": version.verdict,
            "alpha": None if version.parts else version.alpha,
            "config": {key: value for key, value in version.config.items() if key != FILE_DIGEST},
            "resident": _is_resident(version, resident),
        }
        if not version.parts:
            del fields["parts"]
        return cls(**fields)


class AdapterAnswer(Answer):
    name: str
    kind: Literal["adapter", "composition"]
    latest: int
    visibility: Literal["public", "private"] = Field(description="public: other projects may use it")
    aliases: dict[str, int] = Field(description="all aliases except latest")
    parts: list[UsedAdapter] | None = Field(
        default=None, description="only of a composition: the parts of its latest version"
    )
    versions: list[VersionAnswer] = Field(description="oldest first; only the newest, if there are many")
    next: int | None = Field(
        default=None, description="only if there are older versions: pass it as `after` to GET /adapters/{name}"
    )
    resident: bool = Field(description="whether any of these versions is in the engine's memory")

    @classmethod
    def of(cls, adapter: Adapter, resident: Set[str]) -> Self:
        """Return the description of an adapter with its versions. `resident` is as in `VersionAnswer.of`."""
        versions = [VersionAnswer.of(version, resident) for version in adapter.versions]
        answer = cls(
            name=adapter.name,
            kind=adapter.kind,
            latest=adapter.latest,
            visibility="public" if adapter.is_public else "private",
            aliases=dict(adapter.aliases),
            versions=versions,
            resident=any(version.resident for version in versions),
        )
        if adapter.next is not None:
            answer.next = adapter.next
        if adapter.latest_version.parts:
            answer.parts = VersionAnswer.of(adapter.latest_version, resident).parts
        return answer


class AdapterList(Answer):
    adapters: list[AdapterAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


def _is_resident(version: Version, resident: Set[str]) -> bool:
    """Return whether the version is in the engine's memory; for a composition, whether all its parts are."""
    if version.parts:
        return all(part.digest in resident for part in version.parts)
    return version.digest in resident


router = APIRouter(prefix="/adapters", tags=["adapters"])

_SHARED = "/adapters?public=true&name=PROJECT/NAME"

Name = Annotated[str, Path(max_length=4 * MAX_NAME)]


def _decimal(given: object) -> object:
    """Refuse numbers such as 01, +1 and 1.0, which pydantic accepts, so that each version has one URL."""
    if isinstance(given, str) and re.fullmatch(r"0|[1-9][0-9]*", given) is None:
        hint = f": another project's adapter is at {_SHARED}" if is_name(given) and not given[0].isdigit() else ""
        raise ValueError(f"must be a whole number{hint}")
    return given


VersionNumber = Annotated[int, BeforeValidator(_decimal), Path(ge=1)]
Force = Annotated[bool, Query(description="also delete aliases; versions in compositions are never deleted")]


@router.get(
    "",
    summary="List adapters",
    response_class=Response,
    responses={200: {"model": AdapterList, "headers": LINK}, **LOOKUPS},
)
@requires(READ, is_list=True)
async def list_adapters(
    request: Request,
    services: ServicesDep,
    name: Annotated[str | None, Query(max_length=MAX_KEY, description="only this adapter")] = None,
    limit: AllLimit = MAX_ALL,
    after: After = None,
    contains: Annotated[
        str | None, Query(max_length=MAX_KEY, description="only adapters with this in their names, in any case")
    ] = None,
    public: Annotated[bool, Query(description="public adapters of all projects")] = False,
) -> Response:
    """List the project's adapters by name, with their versions; or all projects' public adapters.

    Each adapter comes with its 100 newest versions; on a page of over 100 adapters, with as many as make 10,000
    together.
    """
    page = partial(
        services.library.page,
        name,
        limit,
        after,
        contains=contains,
        public=public,
        num_versions=NUM_VERSIONS,
        max_versions=MAX_ALL,
    )
    return await to_thread.run_sync(_page, request, page, services.engine.stats.resident)


@router.get(
    "/{name}", summary="One adapter", response_class=Response, responses={200: {"model": AdapterAnswer}, **LOOKUPS}
)
@requires(READ, is_list=True)
async def get_adapter(
    services: ServicesDep,
    name: Name,
    limit: Annotated[int, Query(ge=1, le=MAX_ALL, description="versions on a page")] = NUM_VERSIONS,
    after: Annotated[
        int | None, Query(ge=1, lt=1 << 31, description="`next` of the page of newer versions")
    ] = None,
) -> Response:
    """Get an adapter with its newest versions.

    If there are more, the answer has `next`: pass it as `after` for a page of older ones.
    """
    found = await to_thread.run_sync(services.library.get, name, limit, after)
    return wire.answer(AdapterAnswer.of(found, services.engine.stats.resident))


@router.get(
    "/{name}/{version}",
    summary="One version",
    response_class=Response,
    responses={200: {"model": VersionAnswer}, **LOOKUPS},
)
@requires(READ)
async def get_version(services: ServicesDep, name: Name, version: VersionNumber) -> Response:
    """Get one version of an adapter."""
    found = await to_thread.run_sync(services.library.version, name, version)
    return wire.answer(VersionAnswer.of(found, services.engine.stats.resident))


@router.get(
    "/{name}/{version}/download",
    summary="Download",
    response_class=Response,
    responses={200: {"description": "A zip", "content": {"application/zip": {}}}, **DOWNLOADS},
)
@requires(TRAIN, counts=True)
async def download(services: ServicesDep, name: Name, version: VersionNumber) -> Response:
    """Download a version as a zip for PEFT: `adapter_config.json` and `adapter_model.safetensors`.

    `README.md` says how to load it; if a job trained it, it is its model card.
    """
    archive = await to_thread.run_sync(_archive, services, name, version)
    return zip_download(archive, f"{name}-{version}")


@router.post(
    "/{name}",
    summary="Upload",
    status_code=201,
    response_class=Response,
    responses={201: {"model": VersionAnswer, "description": "Published"}, **UPLOADS},
    openapi_extra={"requestBody": UPLOAD_BODY},
)
@requires(TRAIN, upload=True, adds=True)
async def upload(request: Request, services: ServicesDep, name: Name) -> Response:
    """Upload a PEFT adapter as the next version of the name. It becomes the latest.

    An adapter that can't be applied exactly is refused, with the name of each key at fault.
    """
    await to_thread.run_sync(services.library.check_name, name)
    await to_thread.run_sync(services.library.catalog.check_limits, name)
    async with received_form(request, services) as form:
        version = await services.limiters.parsing.run(services.principal.project, _publish, services, name, form)
    headers = {"Location": f"/adapters/{version.name}/{version.version}"}
    return wire.answer(VersionAnswer.of(version, services.engine.stats.resident), 201, headers)


@router.delete("/{name}", summary="Delete an adapter", status_code=204, response_class=Response, responses=DELETES)
@requires(TRAIN)
async def delete_adapter(services: ServicesDep, name: Name, force: Force = False) -> Response:
    """Delete an adapter with all its versions.

    Running requests finish with the old weights. 409 says what still needs one of the versions.
    """
    deed = partial(services.library.delete, name, force)
    await to_thread.run_sync(services.audited, "adapter.delete", name, deed)
    return Response(status_code=204)


@router.delete(
    "/{name}/{version}", summary="Delete a version", status_code=204, response_class=Response, responses=DELETES
)
@requires(TRAIN)
async def delete_version(
    services: ServicesDep, name: Name, version: VersionNumber, force: Force = False
) -> Response:
    """Delete one version.

    Its number is never used again. If it was the latest version, the highest remaining one becomes the latest.
    """
    deed = partial(services.library.delete_version, name, version, force)
    await to_thread.run_sync(services.audited, "adapter.delete", f"{name}@{version}", deed)
    return Response(status_code=204)


def _page(
    request: Request, page: Callable[[], tuple[list[Adapter], str | None]], resident: frozenset[str]
) -> Response:
    found, following = page()
    adapters = [AdapterAnswer.of(adapter, resident) for adapter in found]
    return wire.answer(AdapterList(adapters=adapters, next=following), headers=link(request, following))


def _archive(services: Services, name: str, version: int) -> StoredZip:
    found = services.library.version(name, version)
    hub = _hub_base(services, found)
    try:
        report = None if found.job_id is None else services.jobs.report(found.job_id)
    except NotFound:  # the job was in a database that was lost
        report = None
    card = bare_card(found.base_model, hub) if report is None else model_card(report, hub)
    files = services.library.open(name, version)
    if hub is not None and hub.id != found.base_model:
        with files[CONFIG_NAME] as file:
            files[CONFIG_NAME] = BytesIO(with_base(file.read(), hub.id, hub.revision))
    project, own = split_key(services.principal.viewpoint.key(name))
    services.audit("adapter.download", f"{own}@{version}", project=project)
    return StoredZip(files | {"README.md": BytesIO(card.encode())})


def _hub_base(services: Services, version: Version) -> HubModel | None:
    """Return the version's base on the hub, or None if it isn't known to be there.

    A hub id that the version's configuration has is kept. Other names of the served base, such as a path on the
    machine where the version was made, mean the served base.
    """
    if version.base_model is not None and is_hub_id(version.base_model):
        return HubModel(version.base_model)
    return services.hub_base if services.library.is_of_base(version) else None


def _publish(services: Services, name: str, form: FormData) -> Version:
    with uploaded_files(form) as files, reserved(services, max(0, files.num_bytes - form_bytes(form))):
        version = services.library.publish(name, files.config_json, files.weights)
    services.audit("adapter.upload", f"{name}@{version.version}", {"digest": version.digest})
    return version


aliases_router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=StrictRoute)


class AliasBody(Body):
    """PUT /adapters/{name}/aliases/{alias}."""

    version: int = Field(ge=1, description="the version that the alias points to from now on")


@aliases_router.put(
    "/{name}/aliases/{alias}",
    summary="Set an alias",
    response_class=Response,
    responses={200: {"model": AdapterAnswer}, **ALIASES},
)
@requires(TRAIN)
async def put_alias(services: ServicesDep, name: Name, alias: Name, body: AliasBody) -> Response:
    """Point an alias at a version, creating the alias if need be.

    `latest` is an alias too: moving it back is a rollback.

    Requests that were already accepted keep the version that the alias pointed to then.
    """
    deed = partial(services.library.point, name, alias, body.version)
    target, detail = f"{name}@{alias}", {"version": body.version}
    adapter = await to_thread.run_sync(services.audited, "alias.set", target, deed, detail)
    return wire.answer(AdapterAnswer.of(adapter, services.engine.stats.resident))


@aliases_router.delete(
    "/{name}/aliases/{alias}",
    summary="Remove an alias",
    status_code=204,
    response_class=Response,
    responses=UNALIASES,
)
@requires(TRAIN)
async def delete_alias(services: ServicesDep, name: Name, alias: Name) -> Response:
    """Delete an alias. Its version stays. `latest` can be moved but not deleted."""
    deed = partial(services.library.unpoint, name, alias)
    await to_thread.run_sync(services.audited, "alias.delete", f"{name}@{alias}", deed)
    return Response(status_code=204)


class VisibilityBody(Body):
    """PUT /adapters/{name}/visibility."""

    visibility: Literal["public", "private"] = Field(description="public: other projects may use it")


@aliases_router.put(
    "/{name}/visibility",
    summary="Set the visibility",
    response_class=Response,
    responses={200: {"model": AdapterAnswer}, **DELETES},
)
@requires(TRAIN)
async def put_visibility(services: ServicesDep, name: Name, body: VisibilityBody) -> Response:
    """Let other projects use an adapter or composition as `project/name`, or stop letting them.

    This applies to all its versions, including later ones. A composition can be public only if its parts are.
    """
    deed = partial(services.library.set_visibility, name, body.visibility == "public")
    adapter = await to_thread.run_sync(services.audited, f"adapter.{body.visibility}", name, deed)
    return wire.answer(AdapterAnswer.of(adapter, services.engine.stats.resident))
