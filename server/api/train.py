"""The routes under /train: submit, watch, pause, resume and cancel jobs, and read their results."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import Response

from adapters.errors import Conflict, InvalidInput, NotFound
from adapters.store.packed import open_all
from server.api import wire
from server.api.deps import IdempotencyKey, Services, ServicesDep
from server.api.openapi import JOB_LOOKUPS, JOB_MOVES, JOB_REMOVALS, JOB_RESULTS, SUBMISSIONS
from server.api.pages import LINK, After, Limit, link
from server.api.quotas import require_method, room_for_job
from server.api.routes import TRAIN, requires
from server.api.streams import EventStream
from server.api.strict_route import StrictRoute
from server.api.train_answers import DryRunAnswer, EventAnswer, JobAnswer, JobList
from server.api.train_schemas import TrainBody
from server.api.zips import StoredZip, zip_download
from server.jobs.files import JobFiles
from server.jobs.jobs import Job, Jobs, Status
from server.training.spec import JobSpec

router = APIRouter(prefix="/train", route_class=StrictRoute, tags=["train"])

MAX_EVENTS = 10_000
DRY_RUN_BYTES = 1 << 20
"""The most bytes of text that a dry run tokenizes. This takes about a second of processor time."""
_SSE = "text/event-stream"

JobId = Annotated[str, Path(max_length=256)]
EventNumber = Annotated[int, Query(ge=0, lt=1 << 31, description="only events with a higher seq")]


@router.post(
    "",
    summary="Train an adapter",
    status_code=202,
    response_class=Response,
    responses={
        200: {"model": DryRunAnswer, "description": "With `dry_run`: what the job would be"},
        202: {"model": JobAnswer, "description": "Queued; `Location` has its path"},
        **SUBMISSIONS,
    },
)
@requires(TRAIN, hint="larger data goes through POST /datasets")
async def submit(
    body: TrainBody,
    services: ServicesDep,
    dry_run: Annotated[
        bool, Query(description="check everything and describe the job, but don't queue it")
    ] = False,
    key: IdempotencyKey = None,
) -> Response:
    """Submit a training job.

    Its rows are split and tokenized before it is queued, so errors in them are reported here. A dry run
    tokenizes the first MiB of the rows. If there are more, token counts are estimates, and a warning says so.
    """
    if dry_run:
        require_method(services, body.method)
        return wire.answer(
            await services.limiters.preparing.run(services.principal.project, _dry_run, services, body)
        )
    room = partial(room_for_job, services, method=body.method)
    job = await services.limiters.preparing.run(
        services.principal.project, services.submissions.submit, body, key, None, room
    )
    return wire.answer(JobAnswer.of(job), 202, {"Location": f"/train/{job.id}"})


@router.get(
    "",
    summary="List jobs",
    response_class=Response,
    responses={200: {"model": JobList, "headers": LINK}, **JOB_LOOKUPS},
)
@requires(TRAIN, is_list=True)
async def list_jobs(
    request: Request,
    services: ServicesDep,
    status: Annotated[Status | None, Query(description="only jobs with this status")] = None,
    limit: Limit = 100,
    after: After = None,
) -> Response:
    """List jobs, newest first."""
    return await to_thread.run_sync(_page, request, services.jobs, status, limit, after)


@router.get(
    "/{job_id}", summary="One job", response_class=Response, responses={200: {"model": JobAnswer}, **JOB_LOOKUPS}
)
@requires(TRAIN)
async def get_job(services: ServicesDep, job_id: JobId) -> Response:
    """Get a job."""
    return wire.answer(JobAnswer.of(await to_thread.run_sync(services.jobs.get, job_id)))


@router.get(
    "/{job_id}/events",
    summary="A job's events",
    response_class=Response,
    responses={
        200: {
            "model": list[EventAnswer],
            "description": f"The events; with `Accept: {_SSE}`, each as it happens, until the job ends",
            "headers": LINK,
            "content": {_SSE: {"example": 'id: 2\ndata: {"seq":2,"type":"message","message":"started"}\n\n'}},
        },
        **JOB_LOOKUPS,
    },
)
@requires(TRAIN, is_list=True)
async def get_events(
    request: Request,
    services: ServicesDep,
    job_id: JobId,
    after: EventNumber = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="maximum; a stream has all events")] = MAX_EVENTS,
    last_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            lt=1 << 31,
            description="for a stream that was cut off: takes the place of `after`",
        ),
    ] = None,
) -> Response:
    """List a job's events: messages, and metrics of steps."""
    if _SSE not in request.headers.get("accept", "").lower():
        return await to_thread.run_sync(_events, request, services.jobs, job_id, after, limit)
    await to_thread.run_sync(services.jobs.get, job_id)  # raises NotFound for another project's job
    begin = after if last_id is None else last_id
    follower = services.feeds.follow(job_id, begin, services.principal.project)
    return EventStream(follower.stream(), follower.close)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel",
    response_class=Response,
    responses={200: {"model": JobAnswer}, **JOB_MOVES},
)
@requires(TRAIN)
async def cancel(services: ServicesDep, job_id: JobId) -> Response:
    """Cancel a job. If it is running, its process is stopped within a fraction of a second."""
    return await _steer(services.retention.cancel, job_id)


@router.post(
    "/{job_id}/stop",
    summary="Stop and keep the best",
    response_class=Response,
    responses={200: {"model": JobAnswer}, **JOB_MOVES},
)
@requires(TRAIN)
async def stop(services: ServicesDep, job_id: JobId) -> Response:
    """End a training early, and publish its best weights so far as at its end.

    A running job exits after its current step; it is queued at its old place, and then measured and published. 409
    if it hasn't completed a step.
    """
    return await _steer(services.jobs.stop, job_id)


@router.post(
    "/{job_id}/pause", summary="Pause", response_class=Response, responses={200: {"model": JobAnswer}, **JOB_MOVES}
)
@requires(TRAIN)
async def pause(services: ServicesDep, job_id: JobId) -> Response:
    """Pause a job until it is resumed.

    A running job drops its unfinished step, and is `paused` once its state is stored.
    """
    return await _steer(services.jobs.pause, job_id)


@router.post(
    "/{job_id}/resume",
    summary="Resume",
    response_class=Response,
    responses={200: {"model": JobAnswer}, **JOB_MOVES},
)
@requires(TRAIN)
async def resume(services: ServicesDep, job_id: JobId) -> Response:
    """Resume a paused job. It returns to its old place in the queue."""
    return await _steer(services.jobs.resume, job_id)


@router.get(
    "/{job_id}/report",
    summary="The adapter card",
    response_class=Response,
    responses={200: {"model": dict[str, object]}, **JOB_RESULTS},
)
@requires(TRAIN)
async def get_report(services: ServicesDep, job_id: JobId) -> Response:
    """Get a job's report: comparison with the base, cost, data, configuration and loss curves.

    409 until the job has ended; 404 if it failed.
    """
    return wire.answer(await to_thread.run_sync(_report, services.jobs, job_id))


@router.get(
    "/{job_id}/download",
    summary="Download a full model",
    response_class=Response,
    responses={200: {"description": "A zip", "content": {"application/zip": {}}}, **JOB_RESULTS},
)
@requires(TRAIN, counts=True)
async def download(services: ServicesDep, job_id: JobId) -> Response:
    """Download a model from full fine-tuning, as a zip of its Hugging Face directory.

    Adapters are under /adapters.
    """
    job = await to_thread.run_sync(services.jobs.get, job_id)
    if not isinstance(job.spec, JobSpec) or job.spec.method != "full":
        where = (
            "its adapter" if job.adapter is None else "/adapters/{name}/{version}/download".format(**job.adapter)
        )
        raise NotFound(f"only full fine-tuning leaves a model; see {where}")
    _refuse_unfinished(job, "model")
    if job.files_removed_at is not None:
        raise NotFound("the job's files were removed, and its model with them")
    archive = await to_thread.run_sync(_model, services, job)
    return zip_download(archive, f"{job.name}-{job.id}")


@router.delete(
    "/{job_id}", summary="Remove a job's files", status_code=204, response_class=Response, responses=JOB_REMOVALS
)
@requires(TRAIN)
async def remove_files(services: ServicesDep, job_id: JobId) -> Response:
    """Remove the rows, checkpoints, model and log of a job that has ended.

    The samples in its events are removed, too. The job's record, events and report stay, and so do the versions
    that it published and the data sets that it used. Repeating the request gives the same answer.
    """
    await to_thread.run_sync(remove_job_files, services, job_id)
    return Response(status_code=204)


def _dry_run(services: Services, body: TrainBody) -> DryRunAnswer:
    with services.submissions.prepared(body, DRY_RUN_BYTES) as prepared:
        estimate = services.estimator.estimate(prepared.spec, prepared.data)
        return DryRunAnswer.of(prepared, estimate, services.tokenizer.decode)


def _page(request: Request, jobs: Jobs, status: Status | None, size: int, after: str | None) -> Response:
    if after is not None:
        check_after(jobs, after)
    found = jobs.list(status, size + 1, after)
    page = [JobAnswer.of(job) for job in found[:size]]
    following = found[size - 1].id if len(found) > size else None
    return wire.answer(JobList(jobs=page, next=following), headers=link(request, following))


def check_after(jobs: Jobs, after: str) -> None:
    """Raise InvalidInput if no job has the id `after`: a page can't begin after a job that doesn't exist."""
    try:
        jobs.get(after)
    except NotFound as error:
        raise InvalidInput.of("after", f"{error}; if it was deleted, begin with the first page") from None


def _events(request: Request, jobs: Jobs, job_id: str, after: int, limit: int) -> Response:
    found = jobs.events(job_id, after, limit + 1)
    following = found[limit - 1].seq if len(found) > limit else None
    page = [EventAnswer.model_validate(event) for event in found[:limit]]
    return wire.answer(page, headers=link(request, following))


async def _steer(move: Callable[[str], Job], job_id: str) -> Response:
    return wire.answer(JobAnswer.of(await to_thread.run_sync(move, job_id)))


def remove_job_files(services: Services, job_id: str) -> None:
    """Remove an ended job's files, and record that in the audit list."""
    project = services.jobs.get(job_id).project  # an operator may remove another project's files
    services.audited("job.delete", job_id, partial(services.retention.remove, job_id), project=project)


def _model(services: Services, job: Job) -> StoredZip:
    directory = JobFiles(services.settings.home, services.bucket).fetch_model(job.id)
    try:
        archive = StoredZip(open_all({path.name: path for path in sorted(directory.iterdir()) if path.is_file()}))
    except FileNotFoundError:
        raise NotFound("the model is no longer stored") from None
    services.audit("job.download", job.id, project=job.project)
    return archive


def _report(jobs: Jobs, job_id: str) -> object:
    report = jobs.report(job_id)
    if report is None:
        job = jobs.get(job_id)
        _refuse_unfinished(job, "report")
        report = jobs.report(job_id)  # the job may have ended meanwhile
    return report


def _refuse_unfinished(job: Job, what: str) -> None:
    """Raise Conflict if the job hasn't ended, and NotFound if it ended without success.

    `what` is the error's word for the result that the client asked for.
    """
    if not job.status.has_ended:
        raise Conflict(f"the job is {job.status}: its {what} is available once it has succeeded")
    if job.status is not Status.SUCCEEDED:
        raise NotFound(f"the job has no {what}: its status is {job.status}")
