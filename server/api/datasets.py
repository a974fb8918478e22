"""/datasets: uploaded rows that jobs can train on."""

import json
from collections import Counter
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.datastructures import FormData
from starlette.responses import Response

from adapters.errors import Conflict
from server.api import wire
from server.api.deps import Services, ServicesDep
from server.api.openapi import DATASET_BODY, DATASET_UPLOADS, DATASETS, FULL_DISK
from server.api.pages import LINK, MAX_ALL, After, AllLimit, Limit, link, page_of
from server.api.quotas import growing
from server.api.routes import MAX_UPLOAD_BYTES, TRAIN, requires
from server.api.train_answers import DatasetAnswer, DatasetList, DatasetRow, DatasetRows, DatasetUploaded
from server.api.uploads import form_bytes, received_form, uploaded_rows
from server.training.datasets import no_dataset
from server.training.encoding import texts_of
from server.training.rows import Row, RowNotes, canonical_json, default_share, held_out_flags

router = APIRouter(prefix="/datasets", tags=["train"])


DatasetId = Annotated[str, Path(max_length=256)]


@router.post(
    "",
    summary="Upload a data set",
    status_code=201,
    response_class=Response,
    responses={201: {"model": DatasetUploaded, "description": "Stored, or stored before"}, **DATASET_UPLOADS},
    openapi_extra={"requestBody": DATASET_BODY},
)
@requires(TRAIN, upload=True)
async def upload(request: Request, services: ServicesDep) -> Response:
    """Upload a JSONL or CSV file of rows. Every line is checked. The same rows always get the same id.

    Fields that are not trained on are ignored; `warnings` counts them.
    """
    async with received_form(request, services) as form:
        answer = await services.limiters.checking.run(services.principal.project, _put, services, form)
    return wire.answer(answer, 201, {"Location": f"/datasets/{answer.id}"})


@router.get(
    "",
    summary="List data sets",
    response_class=Response,
    responses={200: {"model": DatasetList, "headers": LINK}, **DATASETS},
)
@requires(TRAIN, is_list=True)
async def list_datasets(
    request: Request, services: ServicesDep, limit: AllLimit = MAX_ALL, after: After = None
) -> Response:
    """List data sets, newest first."""
    found = await to_thread.run_sync(services.datasets.list)
    page, following = page_of(found, lambda dataset: dataset.id, limit, after)
    answer = DatasetList(datasets=[DatasetAnswer.model_validate(dataset) for dataset in page], next=following)
    return wire.answer(answer, headers=link(request, following))


@router.get(
    "/{dataset_id}",
    summary="One data set",
    response_class=Response,
    responses={200: {"model": DatasetAnswer}, **DATASETS},
)
@requires(TRAIN)
async def get_dataset(services: ServicesDep, dataset_id: DatasetId) -> Response:
    """Get a data set's size, format and digest."""
    return wire.answer(DatasetAnswer.model_validate(await to_thread.run_sync(services.datasets.get, dataset_id)))


@router.get(
    "/{dataset_id}/rows",
    summary="Rows of a data set",
    response_class=Response,
    responses={200: {"model": DatasetRows}, **DATASETS},
)
@requires(TRAIN, is_list=True)
async def get_rows(
    services: ServicesDep,
    dataset_id: DatasetId,
    offset: Annotated[int, Query(ge=0, lt=1 << 31, description="how many matching rows to skip")] = 0,
    limit: Limit = 50,
    q: Annotated[str, Query(max_length=1000, description="only rows with this in a text; case is ignored")] = "",
    validation: Annotated[
        float | None,
        Query(ge=0, lt=1, description="share that a job holds out; default: what it holds out by default"),
    ] = None,
) -> Response:
    """List a data set's rows in order, with their lengths, copies, and side of the split."""
    select = partial(_rows, services, dataset_id, offset, limit, q.casefold(), validation)
    return wire.answer(await services.limiters.checking.run(services.principal.project, select))


@router.delete(
    "/{dataset_id}",
    summary="Delete a data set",
    status_code=204,
    response_class=Response,
    responses={**DATASETS, **FULL_DISK},
)
@requires(TRAIN)
async def delete_dataset(services: ServicesDep, dataset_id: DatasetId) -> Response:
    """Delete a data set. Jobs that have ended don't need it any more."""
    deed = partial(_delete, services, dataset_id)
    await to_thread.run_sync(services.audited, "dataset.delete", dataset_id, deed)
    return Response(status_code=204)


def _rows(
    services: Services, dataset_id: str, offset: int, limit: int, text: str, validation: float | None
) -> DatasetRows:
    rows = services.datasets.rows(dataset_id)
    digests = rows.digests()
    share = default_share(len(rows)) if validation is None else validation
    is_held_out = held_out_flags(digests, share) if share else [False] * len(digests)
    copies = Counter(digests)
    found = [number for number in range(len(rows)) if not text or text in _text_of(rows[number])]
    return DatasetRows(
        rows=[
            DatasetRow(
                index=number,
                row=json.loads(canonical_json(rows[number])),
                tokens=sum(len(services.tokenizer.encode(of)) for of in texts_of(rows[number])),
                split="validation" if is_held_out[number] else "train",
                copies=copies[digests[number]],
            )
            for number in found[offset : offset + limit]
        ],
        count=len(found),
        duplicates=len(digests) - len(copies),
    )


def _text_of(row: Row) -> str:
    return "\n".join(texts_of(row)).casefold()


def _put(services: Services, form: FormData) -> DatasetUploaded:
    file, filename = uploaded_rows(form)
    notes = RowNotes()
    with growing(services, form_bytes(form)) as grown:
        dataset = services.datasets.put(file, filename, notes, max_bytes=MAX_UPLOAD_BYTES, grown=grown)
    services.audit("dataset.upload", dataset.id, {"rows": dataset.num_rows})
    return DatasetUploaded(**vars(dataset), warnings=notes.warnings())


def _delete(services: Services, dataset_id: str) -> None:
    if not services.datasets.has(dataset_id):  # `get` would refuse a damaged data set
        raise no_dataset()
    if services.jobs.in_use(dataset_id, services.principal.project):
        raise Conflict("a job that hasn't ended needs this data set: cancel it, or wait for its end")
    services.datasets.delete(dataset_id)
