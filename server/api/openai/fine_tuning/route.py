"""/v1/fine_tuning/jobs: the jobs of /train in OpenAI's form. Disk and tokenizer work in threads."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from adapters.errors import BytesUnavailable, InvalidInput, NotFound
from server.api import wire
from server.api.access.quotas import require_room
from server.api.closed_query import KEYED
from server.api.deps import IdempotencyKey, Services, ServicesDep
from server.api.openai.documents import REFUSALS
from server.api.openai.errors import ModelNotFound
from server.api.openai.fine_tuning.objects import (
    checkpoint_object,
    event_object,
    event_seq,
    job_object,
    kept_fields,
    page_object,
    train_body,
    with_openai_field_names,
)
from server.api.openai.fine_tuning.schemas import (
    FineTuningBody,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    Page,
)
from server.api.openapi import Responses
from server.api.routes import TRAIN, requires
from server.api.strict_route import StrictRoute
from server.api.train.pages import check_after
from server.training.data.files import FileStore, results_id
from server.training.queue.jobs import FINE_TUNING, Job, Jobs, Status

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=StrictRoute, tags=["openai"])

MAX_PAGE = 1000
_BATCH = 100

JobId = Annotated[str, Path(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="of a page")]
After = Annotated[str | None, Query(max_length=256, description="the last id of the page before")]
_JOB: Responses = {200: {"model": FineTuningJob}, **REFUSALS}


@router.post("", summary="Fine-tune", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def create(
    body: FineTuningBody,
    services: ServicesDep,
    key: IdempotencyKey = None,
) -> Response:
    """Create a fine-tuning job. It publishes the next version of the adapter `suffix`."""
    job = await services.limiters.preparing.run(_submit, services, body, key)
    return await to_thread.run_sync(_answer, services, job)


@router.get(
    "", summary="List jobs", response_class=Response, responses={200: {"model": Page[FineTuningJob]}, **REFUSALS}
)
@requires(TRAIN)
async def list_jobs(
    request: Request,
    services: ServicesDep,
    limit: Limit = 20,
    after: After = None,
    metadata: Annotated[
        Literal["null"] | None, Query(description="jobs without any", json_schema_extra=KEYED)
    ] = None,
) -> Response:
    """List jobs, newest first.

    `metadata[key]=value` filters by metadata; `metadata=null` selects jobs without any.
    """
    is_wanted = _metadata_filter(request, metadata is not None)
    return await to_thread.run_sync(_jobs_page, services, limit, after, is_wanted)


@router.get("/{job_id}", summary="One job", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def retrieve(services: ServicesDep, job_id: JobId) -> Response:
    """Get a job."""
    return await to_thread.run_sync(lambda: _answer(services, _get(services.jobs, job_id)))


@router.get(
    "/{job_id}/events",
    summary="A job's events",
    response_class=Response,
    responses={200: {"model": Page[FineTuningEvent]}, **REFUSALS},
)
@requires(TRAIN)
async def list_events(services: ServicesDep, job_id: JobId, limit: Limit = 20, after: After = None) -> Response:
    """List a job's events, newest first."""
    return await to_thread.run_sync(_events_page, services.jobs, job_id, limit, after)


@router.get(
    "/{job_id}/checkpoints",
    summary="A job's checkpoints",
    response_class=Response,
    responses={200: {"model": Page[FineTuningCheckpoint]}, **REFUSALS},
)
@requires(TRAIN)
async def list_checkpoints(
    services: ServicesDep, job_id: JobId, limit: Limit = 10, after: After = None
) -> Response:
    """List the models that a job made: the version that it published, once it has succeeded."""
    return await to_thread.run_sync(_checkpoints_page, services.jobs, job_id, after)


@router.post("/{job_id}/cancel", summary="Cancel", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def cancel(services: ServicesDep, job_id: JobId) -> Response:
    """Cancel a job. A running one stops within a micro-batch."""
    return await _steer(services, services.retention.cancel, job_id)


@router.post("/{job_id}/pause", summary="Pause", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def pause(services: ServicesDep, job_id: JobId) -> Response:
    """Pause a job until it is resumed. A running one is `paused` once its checkpoint is stored."""
    return await _steer(services, services.jobs.pause, job_id)


@router.post("/{job_id}/resume", summary="Resume", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def resume(services: ServicesDep, job_id: JobId) -> Response:
    """Resume a paused job. It returns to its old place in the queue."""
    return await _steer(services, services.jobs.resume, job_id)


def _submit(services: Services, body: FineTuningBody, key: str | None) -> Job:
    submitted = train_body(body, services.base_name, key)
    try:
        return services.submissions.submit(
            submitted, key, kept_fields(body, services.base_name), partial(require_room, services)
        )
    except InvalidInput as error:
        raise with_openai_field_names(error) from None
    except NotFound as error:
        files = {"training_file": body.training_file, "validation_file": body.validation_file}
        for field, file_id in files.items():
            if file_id is not None and not _has_rows(services.files, file_id):
                raise InvalidInput.of(field, "no file of rows has this id: upload one to /v1/files") from None
        raise ModelNotFound(str(error)) from None


def _has_rows(files: FileStore, file_id: str) -> bool:
    try:
        return files.get(file_id).purpose == "fine-tune"
    except NotFound:
        return False


def _get(jobs: Jobs, job_id: str) -> Job:
    """Raises NotFound, also for jobs that weren't made here: they have no files."""
    job = jobs.get(job_id)
    if FINE_TUNING not in job.data:
        raise NotFound(f"there is no job {job_id} under /v1; see /train")
    return job


async def _steer(services: Services, move: Callable[[str], Job], job_id: str) -> Response:
    def work() -> Response:
        _get(services.jobs, job_id)
        return _answer(services, move(job_id))

    return await to_thread.run_sync(work)


def _answer(services: Services, job: Job) -> Response:
    return wire.answer(_objects(services, [job])[0])


def _objects(services: Services, found: Sequence[Job]) -> list[dict[str, object]]:
    """Their results are those that are there. While an object store can't tell, it is what they made."""
    results = {results_id(job.id) for job in found if job.status is Status.SUCCEEDED}
    with suppress(BytesUnavailable):
        results = services.files.present(results)
    now = time.time()
    return [job_object(job, results_id(job.id) in results, now) for job in found]


def _jobs_page(services: Services, limit: int, after: str | None, is_wanted: Callable[[Job], bool]) -> Response:
    if after is not None:
        check_after(services.jobs, after)
    found = list(islice(filter(is_wanted, _all_jobs(services.jobs, after)), limit + 1))
    return wire.answer(page_object(_objects(services, found[:limit]), len(found) > limit))


def _all_jobs(jobs: Jobs, before: str | None) -> Iterator[Job]:
    """Those that were made here, the newest first."""
    while found := jobs.list(limit=_BATCH, before=before):
        yield from (job for job in found if FINE_TUNING in job.data)
        before = found[-1].id


def _metadata_filter(request: Request, is_null: bool) -> Callable[[Job], bool]:
    """Return whether a job has the metadata that the query asks for; `is_null`: it has none."""
    start = "metadata["
    wanted = {
        name[len(start) : -1]: value for name, value in request.query_params.items() if name.startswith(start)
    }

    def is_wanted(job: Job) -> bool:
        kept = job.data[FINE_TUNING]
        assert isinstance(kept, Mapping)
        metadata = kept["metadata"]
        if is_null:
            return metadata is None
        return not wanted or (isinstance(metadata, Mapping) and wanted.items() <= metadata.items())

    return is_wanted


def _events_page(jobs: Jobs, job_id: str, limit: int, after: str | None) -> Response:
    _get(jobs, job_id)
    last = jobs.standings([job_id])[job_id].num_events  # they are numbered without gaps
    if after is not None:
        last = min(last, event_seq(job_id, after) - 1)
    first = max(0, last - limit)
    found = [event_object(job_id, event) for event in jobs.events(job_id, first, last - first)] if last > 0 else []
    return wire.answer(page_object(found[::-1], first > 0))


def _checkpoints_page(jobs: Jobs, job_id: str, after: str | None) -> Response:
    job = _get(jobs, job_id)
    report = jobs.report(job_id) or {}
    step = report.get("steps")
    found = checkpoint_object(job, step) if isinstance(step, int) else None
    if after is not None and (found is None or found["id"] != after):
        raise InvalidInput.of("after", "is no checkpoint of this job")
    return wire.answer(page_object([] if found is None or after is not None else [found], has_more=False))
