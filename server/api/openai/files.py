"""/v1/files: rows to train on, and results of jobs. Disk work runs in threads."""

from functools import partial
from typing import Annotated, BinaryIO, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.datastructures import FormData
from starlette.responses import Response

from adapters.errors import Conflict, InvalidInput, NotFound
from server.api import wire
from server.api.deps import Services, ServicesDep
from server.api.openai.fine_tuning import FileAnswer, FileDeleted, Page, file_object, page_object
from server.api.openai.schemas import REFUSALS
from server.api.routes import TRAIN, requires
from server.api.streams import Download
from server.api.uploads import received_form, uploaded_rows
from server.training.files import FileStore, Purpose, StoredFile

router = APIRouter(prefix="/v1/files", tags=["openai"])

MAX_PAGE = 10_000
_CHUNK = 1 << 16

_PURPOSE = "purpose"

FileId = Annotated[str, Path(max_length=256)]
_MEDIA_TYPES = {"jsonl": "application/jsonl", "csv": "text/csv"}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "JSONL, or CSV if its name ends in .csv",
                    },
                    "purpose": {"const": "fine-tune"},
                },
            }
        }
    },
}
"""The form's documentation. If the route declared the form, FastAPI would read the file before the route runs."""


@router.post(
    "",
    summary="Upload a file",
    response_class=Response,
    responses={200: {"model": FileAnswer}, **REFUSALS},
    openapi_extra={"requestBody": _BODY},
)
@requires(TRAIN, upload=True, adds=True)
async def upload(request: Request, services: ServicesDep) -> Response:
    """Upload a file of rows. Every line is checked. Uploading the same bytes again makes another file."""
    async with received_form(request, services) as form:
        file = await services.limiters.checking.run(services.principal.project, _put, services, form)
    return wire.answer(file_object(file))


@router.get(
    "", summary="List files", response_class=Response, responses={200: {"model": Page[FileAnswer]}, **REFUSALS}
)
@requires(TRAIN, is_list=True)
async def list_files(
    services: ServicesDep,
    purpose: Annotated[Purpose | None, Query(description="only files of this purpose")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="size of a page")] = MAX_PAGE,
    order: Annotated[Literal["asc", "desc"], Query(description="by date; desc: newest first")] = "desc",
    after: Annotated[str | None, Query(max_length=256, description="the last id of the previous page")] = None,
) -> Response:
    """List files: uploads, and the results of jobs."""
    return await to_thread.run_sync(_page, services.files, purpose, limit, order, after)


@router.get(
    "/{file_id}", summary="One file", response_class=Response, responses={200: {"model": FileAnswer}, **REFUSALS}
)
@requires(TRAIN)
async def get_file(services: ServicesDep, file_id: FileId) -> Response:
    """Get a file's name, purpose and size."""
    return wire.answer(file_object(await to_thread.run_sync(services.files.get, file_id)))


@router.get(
    "/{file_id}/content",
    summary="A file's bytes",
    response_class=Response,
    responses={
        200: {"description": "As they were uploaded", "content": {kind: {} for kind in _MEDIA_TYPES.values()}},
        **REFUSALS,
    },
)
@requires(TRAIN, counts=True)
async def get_content(services: ServicesDep, file_id: FileId) -> Response:
    """Download a file's content."""
    file, content = await to_thread.run_sync(_open, services, file_id)
    ending = "csv" if file.format == "csv" else "jsonl"
    # the file's id, since its own name may have any characters
    headers = {"Content-Disposition": f'attachment; filename="{file.id}.{ending}"'}
    pieces = iter(partial(content.read, _CHUNK), b"")
    return Download(pieces, file.bytes, _MEDIA_TYPES[file.format], headers, content.close)


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    response_class=Response,
    responses={200: {"model": FileDeleted}, **REFUSALS},
)
@requires(TRAIN)
async def delete_file(services: ServicesDep, file_id: FileId) -> Response:
    """Delete a file. Jobs that have ended don't need it."""
    await to_thread.run_sync(services.audited, "file.delete", file_id, partial(_delete, services, file_id))
    return wire.answer({"id": file_id, "object": "file", "deleted": True})


def _put(services: Services, form: FormData) -> StoredFile:
    file, filename = uploaded_rows(form, _PURPOSE)
    if form.getlist(_PURPOSE) != ["fine-tune"]:
        raise InvalidInput.of(_PURPOSE, 'must be "fine-tune", once: other purposes are not supported')
    stored = services.files.put(file, filename)
    services.audit("file.upload", stored.id, {"bytes": stored.bytes})
    return stored


def _page(files: FileStore, purpose: Purpose | None, limit: int, order: str, after: str | None) -> Response:
    found = files.list()
    if order == "asc":
        found.reverse()
    if after is not None:
        places = [place for place, file in enumerate(found) if file.id == after]
        if not places:
            raise InvalidInput.of("after", "no file has this id")
        found = found[places[0] + 1 :]
    found = [file for file in found if purpose in (None, file.purpose)]
    return wire.answer(page_object([file_object(file) for file in found[:limit]], len(found) > limit))


def _open(services: Services, file_id: str) -> tuple[StoredFile, BinaryIO]:
    file, content = services.files.get(file_id), services.files.open(file_id)
    services.audit("file.download", file_id)
    return file, content


def _delete(services: Services, file_id: str) -> None:
    if not services.files.has(file_id):  # damaged files can be deleted, too
        raise NotFound("no file has this id")
    if services.jobs.in_use(file_id, services.principal.project):
        raise Conflict("a job that hasn't ended needs this file: cancel it, or wait for its end")
    services.files.delete(file_id)
