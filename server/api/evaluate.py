"""The routes under /evaluate: measure adapters on data sets, and read the findings.

An evaluation is a job. Its events are at GET /train/{id}/events, and it is paused and resumed like a training.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal, Self

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from adapters.errors import InvalidInput, NotFound
from server.api import wire
from server.api.deps import IdempotencyKey, Services, ServicesDep
from server.api.evaluate_submission import EvaluateBody, submit_evaluation
from server.api.openapi import EVALUATIONS, JOB_LOOKUPS, JOB_MOVES, JOB_REMOVALS
from server.api.pages import LINK, After, Limit, link
from server.api.quotas import room_for_job
from server.api.routes import TRAIN, requires
from server.api.schemas import Answer, Timestamp, UsedAdapter
from server.api.strict_route import StrictRoute
from server.api.train import JobId, remove_job_files
from server.jobs.evaluate_spec import MAX_TEXT_BYTES, Candidate, EvaluateSpec, Metric
from server.jobs.jobs import Job, Status

router = APIRouter(prefix="/evaluate", route_class=StrictRoute, tags=["train"])


class EvaluateProgress(Answer):
    step: int = Field(description="adapters measured so far")
    total_steps: int


class EvaluatedAdapter(Answer):
    adapter: str = Field(description="the request's expression")
    parts: list[UsedAdapter] = Field(description="the versions that it meant; none: the base")

    @classmethod
    def of(cls, candidate: Candidate) -> Self:
        return cls(
            adapter=candidate.expression, parts=[UsedAdapter.model_validate(part) for part in candidate.parts]
        )


class EvaluateConfig(Answer):
    adapters: list[EvaluatedAdapter]
    datasets: list[str]
    metrics: list[Metric]
    limit: int


class EvaluationJob(Answer):
    id: str
    project: str
    key: str | None = Field(description="id of the key that submitted the job; null if it needed none")
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    position: int | None = Field(description="place of a queued job in the order of turns, from 1")
    pausing: bool = Field(description="a pause was requested, and the job is still running")
    progress: EvaluateProgress
    error: str | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    files_removed_at: Timestamp | None
    attempt: int = Field(description="how many times a worker has started the job")
    config: EvaluateConfig

    @classmethod
    def fields(cls, job: Job) -> dict[str, object]:
        """Return the fields that describe a job. Its spec must be an evaluation's."""
        spec = job.spec
        assert isinstance(spec, EvaluateSpec)
        return {
            **vars(job),
            "key": job.key_id,
            "pausing": job.is_pausing,
            "progress": {"step": 0, "total_steps": len(spec.adapters), **job.progress},
            "config": EvaluateConfig(
                adapters=[EvaluatedAdapter.of(candidate) for candidate in spec.adapters],
                datasets=list(spec.datasets),
                metrics=list(spec.metrics),
                limit=spec.limit,
            ),
        }


class EvaluationList(Answer):
    evaluations: list[EvaluationJob]
    next: str | None = Field(description="pass it as `after` for the next page")


class Result(Answer):
    adapter: str
    dataset: str
    metric: Metric
    value: float
    low: float | None = Field(description="of the 95 % interval; null: too few rows for a bootstrap's")
    high: float | None
    n: int = Field(description="rows that the metric fits")


class Difference(Answer):
    model_config = ConfigDict(serialize_by_alias=True)

    dataset: str
    metric: Metric
    from_: str = Field(alias="from", description="the first adapter")
    to: str
    difference: float = Field(description="value of `to` minus value of `from`, on the same rows")
    low: float | None
    high: float | None
    gained: int | None = Field(
        None, description="exact_match, json_valid and accuracy: rows that only `to` gets right"
    )
    lost: int | None = Field(None, description="rows that only `from` gets right")


class Flip(Answer):
    model_config = ConfigDict(serialize_by_alias=True)

    dataset: str
    metric: Metric
    row: int = Field(description="number in the data set, from 0")
    from_: str = Field(alias="from")
    to: str
    answers: list[str | bool | None] = Field(
        description=f"of `from` and of `to`; null: no room for an answer; beyond {MAX_TEXT_BYTES:,} bytes cut"
    )
    gained: bool = Field(description="whether `to` is right")


class EvaluationAnswer(EvaluationJob):
    results: list[Result] | None = Field(description="null until the job has succeeded")
    differences: list[Difference] | None = Field(description="between the first adapter and each other one")
    flips: list[Flip] | None = Field(
        description="up to 1,000 rows that only one of two compared adapters gets right"
    )

    @classmethod
    def of(cls, job: Job, report: Mapping[str, object] | None) -> Self:
        """Describe a job. Its report is None until it has succeeded."""
        found = {name: (report or {}).get(name) for name in ("results", "differences", "flips")}
        return cls.model_validate({**cls.fields(job), **found})


@router.post(
    "",
    summary="Evaluate adapters",
    status_code=202,
    response_class=Response,
    responses={
        202: {"model": EvaluationAnswer, "description": "Queued; `Location` has its path"},
        **EVALUATIONS,
    },
)
@requires(TRAIN)
async def evaluate(body: EvaluateBody, services: ServicesDep, key: IdempotencyKey = None) -> Response:
    """Measure adapters on the same rows of data sets.

    A row counts in each metric that fits it: `exact_match` needs a prompt and its completion, `json_valid` also a
    `schema`, `accuracy` and `brier` a decision. Intervals are of 95 %. Rows are tokenized before the job is
    queued, so errors in them are reported here.
    """
    room = partial(room_for_job, services)
    job = await services.limiters.preparing.run(
        services.principal.project, submit_evaluation, services.submissions, body, key, room
    )
    return wire.answer(EvaluationAnswer.of(job, None), 202, {"Location": f"/evaluate/{job.id}"})


@router.get(
    "",
    summary="List evaluations",
    response_class=Response,
    responses={200: {"model": EvaluationList, "headers": LINK}, **JOB_LOOKUPS},
)
@requires(TRAIN, is_list=True)
async def list_evaluations(
    request: Request,
    services: ServicesDep,
    status: Annotated[Status | None, Query(description="only jobs with this status")] = None,
    limit: Limit = 100,
    after: After = None,
) -> Response:
    """List evaluations, newest first, without their findings."""
    return await to_thread.run_sync(_page, request, services, status, limit, after)


@router.get(
    "/{job_id}",
    summary="One evaluation",
    response_class=Response,
    responses={200: {"model": EvaluationAnswer}, **JOB_LOOKUPS},
)
@requires(TRAIN, is_list=True)
async def get_evaluation(services: ServicesDep, job_id: JobId) -> Response:
    """Get an evaluation, with its findings once it has succeeded."""
    return wire.answer(await to_thread.run_sync(_answer, services, job_id))


@router.post(
    "/{job_id}/cancel",
    summary="Cancel",
    response_class=Response,
    responses={200: {"model": EvaluationAnswer}, **JOB_MOVES},
)
@requires(TRAIN)
async def cancel(services: ServicesDep, job_id: JobId) -> Response:
    """Cancel an evaluation. If it is running, its process is stopped within a fraction of a second."""
    return wire.answer(await to_thread.run_sync(_cancel, services, job_id))


@router.delete(
    "/{job_id}", summary="Remove its files", status_code=204, response_class=Response, responses=JOB_REMOVALS
)
@requires(TRAIN)
async def remove_files(services: ServicesDep, job_id: JobId) -> Response:
    """Remove the rows, flips and log of an evaluation that has ended. Its record and other findings stay."""
    await to_thread.run_sync(_remove_files, services, job_id)
    return Response(status_code=204)


def _page(request: Request, services: Services, status: Status | None, size: int, after: str | None) -> Response:
    if after is not None:
        try:
            _evaluation(services, after)
        except NotFound as error:
            raise InvalidInput.of("after", f"{error}; begin with the first page") from None
    found = services.jobs.list(status, size + 1, after, evaluations=True)
    page = [EvaluationJob.model_validate(EvaluationJob.fields(job)) for job in found[:size]]
    following = found[size - 1].id if len(found) > size else None
    return wire.answer(EvaluationList(evaluations=page, next=following), headers=link(request, following))


def _evaluation(services: Services, job_id: str) -> Job:
    """Return the job. Raise NotFound if it doesn't exist or isn't an evaluation."""
    try:
        job = services.jobs.get(job_id)
    except NotFound:
        job = None
    if job is None or not isinstance(job.spec, EvaluateSpec):
        raise NotFound(f"there is no evaluation {job_id}: GET /evaluate lists them")
    return job


def _answer(services: Services, job_id: str) -> EvaluationAnswer:
    job = _evaluation(services, job_id)
    return EvaluationAnswer.of(job, services.jobs.report(job_id) if job.status is Status.SUCCEEDED else None)


def _cancel(services: Services, job_id: str) -> EvaluationAnswer:
    _evaluation(services, job_id)
    return EvaluationAnswer.of(services.retention.cancel(job_id), None)


def _remove_files(services: Services, job_id: str) -> None:
    _evaluation(services, job_id)
    remove_job_files(services, job_id)
