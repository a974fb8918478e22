"""Between OpenAI's fine-tuning jobs and ours: a body becomes one for POST /train; jobs and events become objects.

What OpenAI's form has beyond ours is kept with the job (`kept_fields`); everything else is the job's own.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import cast

from adapters.errors import FieldError, InvalidInput
from adapters.names import BASE
from server.api.openai.fine_tuning.schemas import FineTuningBody, HyperparametersBody
from server.api.train.schemas import TrainBody
from server.training.data.files import StoredFile, results_id
from server.training.queue.jobs import FINE_TUNING, Event, Job, Status
from server.training.spec import LEARNING_RATES, JobSpec

ORGANIZATION = "smolora"
EVENT, CHECKPOINT = "ftevent", "ftckpt"
_LEVELS = {"warning": "warn"}
_MEASURES = {
    "train_loss": ("train_loss",),
    "eval_loss": ("valid_loss", "full_valid_loss"),  # always of all held-out rows
    "eval_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}
"""Our name of a measure, and OpenAI's."""
_FIELDS = {
    ("name",): ("suffix",),
    ("start_from",): ("model",),
    ("dataset",): ("training_file",),
    ("validation",): ("validation_file",),
    ("training", "epochs"): ("hyperparameters", "n_epochs"),
}
"""The start of a field's place in POST /train's body, and in OpenAI's."""


def train_body(body: FineTuningBody, base_name: str, idempotency_key: str | None) -> TrainBody:
    """The job as POST /train takes it. Raises InvalidInput."""
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
    """What is to be stored with the job."""
    multiplier = _hyperparameters(body).learning_rate_multiplier
    return {
        "base": base_name,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "learning_rate_multiplier": 1.0 if multiplier is None else multiplier,
        "metadata": body.metadata,
    }


def with_openai_field_names(error: InvalidInput) -> InvalidInput:
    """The faults that POST /train would name, by the names of OpenAI's fields."""
    return InvalidInput([FieldError(_renamed(fault.loc), fault.message) for fault in error.errors], error.num_more)


def job_object(job: Job, has_results: bool, now: float) -> dict[str, object]:
    """`has_results`: its result file is there; `now` is the time, in seconds since 1970."""
    kept, spec = cast("Mapping[str, object]", job.data[FINE_TUNING]), job.spec
    assert isinstance(spec, JobSpec), "no merge is made here"
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
    """One of the job's events; losses on held-out rows under OpenAI's name."""
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
    """The number of the job's event that has this id. Raises InvalidInput on `after`."""
    start, _, number = event_id.rpartition("-")
    if start != f"{EVENT}-{job_id}" or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise InvalidInput.of("after", "is no event of this job")
    return int(number)


def checkpoint_object(job: Job, step: int) -> dict[str, object] | None:
    """The version that the job published, with the weights of `step`; None where it published none.

    Checkpoints that a job goes on from are no models and have no names.
    """
    model = _published(job)
    if model is None:
        return None
    assert job.finished_at is not None, "it has published"
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
    """A file; it is processed, since every line was checked before it was stored."""
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
    """Some objects of many; the last one's id is where the next page begins."""
    ids = [item["id"] for item in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def _hyperparameters(body: FineTuningBody) -> HyperparametersBody:
    """Those of `method`, or those in the older place. Raises InvalidInput where both are given."""
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
    """A name of its own for a job without a suffix; the same for a repeat of the same request."""
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
