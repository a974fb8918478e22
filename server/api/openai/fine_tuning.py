"""/v1/fine_tuning/jobs: the jobs of /train in OpenAI's form. Disk and tokenizer work runs in threads.

OpenAI's fields that aren't supported are refused by name. A body is converted into a body for POST /train. Fields
that POST /train doesn't have are stored with the job (`kept_fields`). The answers are built as dictionaries; the
models of answers here only document them.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Annotated, Generic, Literal, TypeVar, cast

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from starlette.responses import Response

from adapters.errors import BytesUnavailable, FieldError, InvalidInput, NotFound
from adapters.names import BASE, MAX_NAME
from server.api import wire
from server.api.deps import IdempotencyKey, Services, ServicesDep
from server.api.openai.schemas import REFUSALS
from server.api.openapi import Responses
from server.api.problems import ModelNotFound
from server.api.quotas import room_for_job
from server.api.routes import TRAIN, requires
from server.api.schemas import MAX_SEED, Body
from server.api.strict_route import KEYED, StrictRoute
from server.api.train import check_after
from server.api.train_schemas import TrainBody
from server.jobs.jobs import FINE_TUNING, Event, Job, Jobs, Status
from server.training.files import FileStore, StoredFile, results_id
from server.training.spec import LEARNING_RATES, JobSpec

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
"""Limits of metadata: pairs, and characters of a key and of a value."""

Item = TypeVar("Item")


def _auto(value: object) -> object:
    return None if value == "auto" else value


def _unsupported(value: object) -> None:
    if value:
        raise ValueError("is not supported here: leave it out")


def _metadata(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_PAIRS:
        raise ValueError(f"must be an object of at most {MAX_PAIRS} texts")
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > MAX_KEY or len(text) > MAX_VALUE:
            raise ValueError(f"keys are texts of at most {MAX_KEY} characters, values of at most {MAX_VALUE}")
        if "\0" in key + text:
            raise ValueError("must not have NUL characters")
    return value


FileId = Annotated[str, Field(max_length=64, pattern="^file-")]
AutoInt = Annotated[int | None, BeforeValidator(_auto, int | Literal["auto"] | None)]
AutoFloat = Annotated[float | None, BeforeValidator(_auto, float | Literal["auto"] | None)]
Unsupported = Annotated[None, BeforeValidator(_unsupported)]
Metadata = Annotated[dict[str, str] | None, BeforeValidator(_metadata, dict[str, str] | None)]


class HyperparametersBody(Body):
    """Hyperparameters. `auto` is the default of POST /train."""

    n_epochs: AutoInt = Field(None, ge=1, le=10_000)
    batch_size: AutoInt = Field(None, ge=1, le=4096, description="rows of an optimizer step")
    learning_rate_multiplier: AutoFloat = Field(None, ge=1e-6, le=1e6, description="times 1e-3; auto: 1")


class SupervisedBody(Body):
    """The options of supervised fine-tuning."""

    hyperparameters: HyperparametersBody = HyperparametersBody.model_validate({})


class MethodBody(Body):
    """The kind of fine-tuning: supervised is the only one."""

    type: Literal["supervised"]
    supervised: SupervisedBody = SupervisedBody.model_validate({})
    dpo: Unsupported = None
    reinforcement: Unsupported = None


class FineTuningBody(Body):
    """The body of POST /v1/fine_tuning/jobs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "training_file": "file-…",
                    "suffix": "codes",
                    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
                }
            ]
        }
    )

    model: str = Field(
        max_length=2 * MAX_NAME + 1,
        description="the base, or an adapter to continue: name, name@3 or name@alias",
    )
    training_file: FileId = Field(description="an id from POST /v1/files")
    validation_file: FileId | None = Field(None, description="an id of held-out rows; null: none")
    suffix: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_NAME,
        description="the name of the adapter that gets a new version; null: a new name",
    )
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = Field(None, description="the older place of those in method")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: 0")
    metadata: Metadata = None
    integrations: Unsupported = None


class Page(BaseModel, Generic[Item]):
    """A page of a list. `last_id` is `after` for the next page."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileAnswer(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = Field(description="every line was checked at upload")
    expires_at: None
    status_details: None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Hyperparameters(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class Supervised(BaseModel):
    hyperparameters: Hyperparameters


class Method(BaseModel):
    type: Literal["supervised"]
    supervised: Supervised


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    id: str = Field(description="the id under /train, too")
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str = Field(description="the base, or the version that the job continues")
    fine_tuned_model: str | None = Field(description="name@version, once it has succeeded")
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="a CSV of the steps' metrics, once it has succeeded")
    method: Method
    hyperparameters: Hyperparameters
    seed: int
    trained_tokens: int | None = Field(description="input tokens of all steps without padding, once it has ended")
    metadata: dict[str, str] | None
    error: JobError | None
    integrations: list[JsonValue]


class FineTuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, JsonValue]


class FineTuningCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


ORGANIZATION = "smolora"
EVENT, CHECKPOINT = "ftevent", "ftckpt"
_LEVELS = {"warning": "warn"}
_MEASURES = {
    "train_loss": ("train_loss",),
    "eval_loss": ("valid_loss", "full_valid_loss"),  # always of all held-out rows
    "eval_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}
"""Our names of metrics, with OpenAI's names for the same metrics."""
_FIELDS = {
    ("name",): ("suffix",),
    ("start_from",): ("model",),
    ("dataset",): ("training_file",),
    ("validation",): ("validation_file",),
    ("training", "epochs"): ("hyperparameters", "n_epochs"),
}
"""Prefixes of a field's location in the body of POST /train, with the prefixes in OpenAI's body."""


def train_body(body: FineTuningBody, base_name: str, idempotency_key: str | None) -> TrainBody:
    """Return the equivalent body for POST /train. Raise InvalidInput if the hyperparameters are given twice."""
    asked = _hyperparameters(body)
    training: dict[str, object] = {"seed": body.seed or 0}
    if asked.n_epochs is not None:
        training["epochs"] = asked.n_epochs
    if asked.batch_size is not None:
        training["batch_size"] = asked.batch_size
    if asked.learning_rate_multiplier is not None:
        training["learning_rate"] = asked.learning_rate_multiplier * LEARNING_RATES["lora"]
    return TrainBody.model_validate(
        {
            "name": body.suffix or _new_name(idempotency_key),
            "dataset": body.training_file,
            "validation": body.validation_file or 0.0,
            "training": training,
            "start_from": None if body.model in (BASE, base_name) else body.model,
        }
    )


def kept_fields(body: FineTuningBody, base_name: str) -> dict[str, object]:
    """Return the fields that POST /train doesn't have, to store them with the job."""
    multiplier = _hyperparameters(body).learning_rate_multiplier
    return {
        "base": base_name,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "learning_rate_multiplier": 1.0 if multiplier is None else multiplier,
        "metadata": body.metadata,
    }


def with_openai_field_names(error: InvalidInput) -> InvalidInput:
    """Return the error with OpenAI's names for the fields of POST /train."""
    return InvalidInput([FieldError(_renamed(fault.loc), fault.message) for fault in error.errors], error.num_more)


def job_object(job: Job, has_results: bool, now: float) -> dict[str, object]:
    """Return a job in OpenAI's form.

    `has_results` says whether the job has a result file. `now` is in seconds since 1970.
    """
    kept, spec = cast("Mapping[str, object]", job.data[FINE_TUNING]), job.spec
    assert isinstance(spec, JobSpec), "merges have no job here"
    hyperparameters = {
        "n_epochs": spec.training.epochs,
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": kept["learning_rate_multiplier"],
    }
    left = job.progress.get("eta_seconds") if job.status is Status.RUNNING else None
    failure = {"code": "training_failed", "message": job.error, "param": None}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at.timestamp()),
        "finished_at": None if job.finished_at is None else int(job.finished_at.timestamp()),
        "estimated_finish": int(now + left) if isinstance(left, int | float) else None,
        "status": job.status.value,
        "model": spec.start_from or kept["base"],
        "fine_tuned_model": _published(job),
        "organization_id": ORGANIZATION,
        "training_file": kept["training_file"],
        "validation_file": kept["validation_file"],
        "result_files": [results_id(job.id)] if has_results else [],
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "hyperparameters": hyperparameters,
        "seed": spec.training.seed,
        "trained_tokens": job.progress.get("tokens", 0) if job.status.has_ended else None,
        "metadata": kept["metadata"],
        "error": failure if job.status is Status.FAILED else None,
        "integrations": [],
    }


def event_object(job_id: str, event: Event) -> dict[str, object]:
    """Return an event in OpenAI's form, with OpenAI's names of metrics."""
    return {
        "id": f"{EVENT}-{job_id}-{event.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.at.timestamp()),
        "level": _LEVELS.get(event.level, event.level),
        "type": event.type,
        "message": event.message,
        "data": {_MEASURES[key][0] if key in _MEASURES else key: value for key, value in event.data.items()},
    }


def event_seq(job_id: str, event_id: str) -> int:
    """Return the number of the event with this id. Raise InvalidInput if it isn't the id of this job's event."""
    start, _, number = event_id.rpartition("-")
    if start != f"{EVENT}-{job_id}" or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise InvalidInput.of("after", "is not an event of this job")
    return int(number)


def checkpoint_object(job: Job, step: int) -> dict[str, object] | None:
    """Return the version that the job published, as a checkpoint in OpenAI's form, or None if it published none.

    `step` is the step whose weights the version has. The checkpoints that a job resumes from aren't listed,
    because they aren't models and have no names.
    """
    model = _published(job)
    if model is None:
        return None
    assert job.finished_at is not None, "a job that published has ended"
    metrics = {
        name: job.metrics[measure]
        for measure, names in _MEASURES.items()
        if measure in job.metrics
        for name in names
    }
    return {
        "id": f"{CHECKPOINT}-{job.id}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(job.finished_at.timestamp()),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": model,
        "step_number": step,
        "metrics": {"step": step, **metrics},
    }


def file_object(file: StoredFile) -> dict[str, object]:
    """Return a file in OpenAI's form. Its status is `processed`: lines are checked before it is stored."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


def page_object(data: Sequence[Mapping[str, object]], has_more: bool) -> dict[str, object]:
    """Return one page of a list in OpenAI's form."""
    ids = [item["id"] for item in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def _hyperparameters(body: FineTuningBody) -> HyperparametersBody:
    """Return the hyperparameters in `method`, or in the older field `hyperparameters`.

    Raise InvalidInput if both fields have some.
    """
    if body.hyperparameters is None:
        return (
            HyperparametersBody.model_validate({})
            if body.method is None
            else body.method.supervised.hyperparameters
        )
    if body.method is not None and "supervised" in body.method.model_fields_set:
        raise InvalidInput.of("hyperparameters", "are in method.supervised already: give them once")
    return body.hyperparameters


def _new_name(idempotency_key: str | None) -> str:
    """Return a unique adapter name, for a job without `suffix`. Equal idempotency keys give equal names."""
    if idempotency_key is None:
        return f"ft-{secrets.token_hex(4)}"
    return f"ft-{hashlib.sha256(idempotency_key.encode()).hexdigest()[:8]}"


def _published(job: Job) -> str | None:
    return None if job.adapter is None else "{name}@{version}".format(**job.adapter)


def _renamed(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    for start, name in _FIELDS.items():
        if loc[: len(start)] == start:
            return (*name, *loc[len(start) :])
    return loc


router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=StrictRoute, tags=["openai"])

MAX_PAGE = 1000
_BATCH = 100

JobId = Annotated[str, Path(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="size of a page")]
After = Annotated[str | None, Query(max_length=256, description="the last id of the previous page")]
_JOB: Responses = {200: {"model": FineTuningJob}, **REFUSALS}


@router.post("", summary="Fine-tune", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def create(
    body: FineTuningBody,
    services: ServicesDep,
    key: IdempotencyKey = None,
) -> Response:
    """Create a fine-tuning job. It publishes the next version of the adapter `suffix`."""
    job = await services.limiters.preparing.run(services.principal.project, _submit, services, body, key)
    return await to_thread.run_sync(_answer, services, job)


@router.get(
    "", summary="List jobs", response_class=Response, responses={200: {"model": Page[FineTuningJob]}, **REFUSALS}
)
@requires(TRAIN, is_list=True)
async def list_jobs(
    request: Request,
    services: ServicesDep,
    limit: Limit = 20,
    after: After = None,
    metadata: Annotated[
        Literal["null"] | None, Query(description="jobs without metadata", json_schema_extra=KEYED)
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
@requires(TRAIN, is_list=True)
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
    """List the version that a job published, once it has succeeded."""
    return await to_thread.run_sync(_checkpoints_page, services.jobs, job_id, after)


@router.post("/{job_id}/cancel", summary="Cancel", response_class=Response, responses=_JOB)
@requires(TRAIN)
async def cancel(services: ServicesDep, job_id: JobId) -> Response:
    """Cancel a job. If it is running, its process is stopped within a fraction of a second."""
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
            submitted, key, kept_fields(body, services.base_name), partial(room_for_job, services)
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
    """Return a job that was created under /v1. Raise NotFound for a job of POST /train, which has no file ids."""
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
    """Return jobs in OpenAI's form. If the object store can't be reached, assume that result files exist."""
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
    """Yield the jobs that were created under /v1, newest first. If `before` is given, start after that job."""
    while found := jobs.list(limit=_BATCH, before=before):
        yield from (job for job in found if FINE_TUNING in job.data)
        before = found[-1].id


def _metadata_filter(request: Request, is_null: bool) -> Callable[[Job], bool]:
    """Return a filter of jobs by the metadata in the query. If `is_null`, it selects jobs without metadata."""
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
    last = jobs.standings([job_id])[job_id].num_events  # events are numbered without gaps
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
        raise InvalidInput.of("after", "is not a checkpoint of this job")
    return wire.answer(page_object([] if found is None or after is not None else [found], has_more=False))
