"""What /v1/files and /v1/fine_tuning/jobs take and answer, as pydantic sees it; names and shapes are OpenAI's.

As in `server.api.schemas`, fields that can't be honoured are refused by name, and the answers' classes document
what is built by hand.
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from adapters.names import MAX_NAME
from server.api.schemas import MAX_SEED, Body

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
"""Of metadata: pairs, and characters of a key and of a value."""


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
    """`auto` is what POST /train takes where nothing is said."""

    n_epochs: AutoInt = Field(None, ge=1, le=10_000)
    batch_size: AutoInt = Field(None, ge=1, le=4096, description="rows of an optimizer step")
    learning_rate_multiplier: AutoFloat = Field(None, ge=1e-6, le=1e6, description="times 1e-3; auto: 1")


class SupervisedBody(Body):
    """How supervised fine-tuning is done."""

    hyperparameters: HyperparametersBody = HyperparametersBody.model_validate({})


class MethodBody(Body):
    """The one kind of fine-tuning that there is here."""

    type: Literal["supervised"]
    supervised: SupervisedBody = SupervisedBody.model_validate({})
    dpo: Unsupported = None
    reinforcement: Unsupported = None


class FineTuningBody(Body):
    """POST /v1/fine_tuning/jobs."""

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
        description="the base, or an adapter to go on from: name, name@3 or name@alias",
    )
    training_file: FileId = Field(description="an id from POST /v1/files")
    validation_file: FileId | None = Field(None, description="likewise; null: nothing is held out")
    suffix: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_NAME,
        description="the name of the adapter that becomes a version; null: a new one",
    )
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = Field(None, description="the older place of method's")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: 0")
    metadata: Metadata = None
    integrations: Unsupported = None


class Page(BaseModel, Generic[Item]):
    """Some of many. `last_id` is the next page's `after`."""

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
    status: Literal["processed"] = Field(description="every line was checked when it was uploaded")
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
    id: str = Field(description="as under /train")
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str = Field(description="the base, or the version that it goes on from")
    fine_tuned_model: str | None = Field(description="name@version, once it has succeeded")
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="a CSV of the steps' metrics, once it has succeeded")
    method: Method
    hyperparameters: Hyperparameters
    seed: int
    trained_tokens: int | None = Field(description="inputs of all steps without padding, once it has ended")
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
