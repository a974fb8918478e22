"""/adapters: list, upload, download, delete. Everything on disk happens in threads."""

import re
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Annotated, BinaryIO

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from pydantic import BeforeValidator
from starlette.datastructures import FormData
from starlette.responses import Response

from adapters.catalog.catalog import Adapter, Version
from adapters.errors import NotFound
from adapters.names import MAX_KEY, MAX_NAME, is_name
from server.api import wire
from server.api.access.quotas import reserved
from server.api.adapters.answers import adapter_answer, version_answer
from server.api.adapters.schemas import AdapterAnswer, AdapterList, VersionAnswer
from server.api.deps import Services, ServicesDep
from server.api.openapi import DELETES, DOWNLOADS, LOOKUPS, UPLOAD_BODY, UPLOADS
from server.api.routes import READ, TRAIN, requires
from server.api.uploads import form_bytes, received_form, uploaded_files
from server.api.zips import StoredZip, zip_download
from server.training.reports.model_card import model_card

router = APIRouter(prefix="/adapters", tags=["adapters"])

MAX_PAGE = 10_000
_SHARED = "/adapters?public=true&name=PROJECT/NAME"

Name = Annotated[str, Path(max_length=4 * MAX_NAME)]


def _decimal(given: object) -> object:
    """Refuse what `int` also takes, such as 01, +1 and 1.0: each version has one URL."""
    if isinstance(given, str) and re.fullmatch(r"0|[1-9][0-9]*", given) is None:
        hint = f": another project's adapter is at {_SHARED}" if is_name(given) and not given[0].isdigit() else ""
        raise ValueError(f"must be a whole number{hint}")
    return given


VersionNumber = Annotated[int, BeforeValidator(_decimal), Path(ge=1)]
Force = Annotated[bool, Query(description="let aliases go, too; compositions hold in any case")]


@router.get(
    "", summary="List adapters", response_class=Response, responses={200: {"model": AdapterList}, **LOOKUPS}
)
@requires(READ)
async def list_adapters(
    services: ServicesDep,
    name: Annotated[str | None, Query(max_length=MAX_KEY, description="only this one")] = None,
    limit: Annotated[int | None, Query(ge=1, le=MAX_PAGE, description="of a page")] = None,
    after: Annotated[str | None, Query(max_length=MAX_KEY, description="the last name of the page before")] = None,
    contains: Annotated[
        str | None, Query(max_length=MAX_KEY, description="only those with this in their names, in whichever case")
    ] = None,
    public: Annotated[bool, Query(description="those that other projects may use, of all projects")] = False,
) -> Response:
    """List the project's adapters by name, with all their versions; or what projects share with each other.

    If `next` is not null, pass it as `after` for the next page.
    """
    resident = services.engine.stats.resident
    page = partial(services.library.page, name, limit or MAX_PAGE, after, contains=contains, public=public)
    return await to_thread.run_sync(_page, page, resident)


@router.get(
    "/{name}", summary="One adapter", response_class=Response, responses={200: {"model": AdapterAnswer}, **LOOKUPS}
)
@requires(READ)
async def get_adapter(services: ServicesDep, name: Name) -> Response:
    """Get an adapter with all its versions."""
    found = await to_thread.run_sync(services.library.get, name)
    return wire.answer(adapter_answer(found, services.engine.stats.resident))


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
    return wire.answer(version_answer(found, services.engine.stats.resident))


@router.get(
    "/{name}/{version}/download",
    summary="Download",
    response_class=Response,
    responses={200: {"description": "A zip", "content": {"application/zip": {}}}, **DOWNLOADS},
)
@requires(TRAIN)
async def download(services: ServicesDep, name: Name, version: VersionNumber) -> Response:
    """Download a version as a zip with `adapter_config.json` and `adapter_model.safetensors`, which PEFT can
    load.

    If a job trained it, the zip also has its card as `README.md`.
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
@requires(TRAIN, upload=True)
async def upload(request: Request, services: ServicesDep, name: Name) -> Response:
    """Upload a PEFT adapter as the next version of the name. It becomes the latest.

    An adapter that can't be used exactly is refused, with the name of each key that is at fault.
    """
    await to_thread.run_sync(services.library.check_name, name)
    async with received_form(request, services) as form:
        version = await services.limiters.parsing.run(_publish, services, name, form)
    headers = {"Location": f"/adapters/{version.name}/{version.version}"}
    return wire.answer(version_answer(version, services.engine.stats.resident), 201, headers)


@router.delete("/{name}", summary="Delete an adapter", status_code=204, response_class=Response, responses=DELETES)
@requires(TRAIN)
async def delete_adapter(services: ServicesDep, name: Name, force: Force = False) -> Response:
    """Delete an adapter with all its versions.

    Requests that are running finish with the old weights. 409 says what still needs one of the versions.
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

    Its number is never used again; if it was the latest, the highest remaining one is now.
    """
    deed = partial(services.library.delete_version, name, version, force)
    await to_thread.run_sync(services.audited, "adapter.delete", f"{name}@{version}", deed)
    return Response(status_code=204)


def _page(page: Callable[[], tuple[list[Adapter], str | None]], resident: frozenset[str]) -> Response:
    found, following = page()
    return wire.answer({"adapters": [adapter_answer(adapter, resident) for adapter in found], "next": following})


def _archive(services: Services, name: str, version: int) -> StoredZip:
    job_id = services.library.version(name, version).job_id
    try:
        report = None if job_id is None else services.jobs.report(job_id)
    except NotFound:  # its database was lost
        report = None
    card: dict[str, BinaryIO] = {} if report is None else {"README.md": BytesIO(model_card(report).encode())}
    return StoredZip(services.library.open(name, version) | card)


def _publish(services: Services, name: str, form: FormData) -> Version:
    with uploaded_files(form) as files, reserved(services, max(0, files.num_bytes - form_bytes(form))):
        return services.library.publish(name, files.config_json, files.weights)
