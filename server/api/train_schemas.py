"""What POST /train takes and what the paths under /train and /datasets answer, as pydantic sees it.

Bounds that the base or the data decide, and what rows look like, are `server.api.submission`'s part. As in
`server.api.schemas`, the answers' classes document what is built by hand.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from adapters.lora import MODULES
from adapters.names import MAX_NAME, near
from server.api.estimate import Estimate
from server.api.schemas import MAX_SEED, Body
from server.training.spec import (
    LEARNING_RATES,
    Init,
    JobSpec,
    LoraSpec,
    Method,
    Overlong,
    PublishIf,
    Schedule,
    TrainingSpec,
)

MAX_TRAINED_RANK = 256
MAX_STEPS = 1_000_000
MAX_DESCRIPTION = 2000
ALL_LINEAR = "all-linear"

Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]


def _target_modules(value: object) -> tuple[str, ...]:
    """The names, each once, in the order in which the forward pass meets them."""
    if value == ALL_LINEAR:
        return MODULES
    if not isinstance(value, list) or not value:
        raise ValueError(f'must be "{ALL_LINEAR}" or a list of names out of {", ".join(MODULES)}')
    strange = [number for number, name in enumerate(value) if name not in MODULES]
    if strange:
        meant = near(str(value[strange[0]]), MODULES)
        hint = f": did you mean {meant}?" if meant else f": it must be one of {', '.join(MODULES)}"
        raise ValueError(f"item {strange[0]} is no linear layer of the base{hint}")
    if len(set(value)) < len(value):
        raise ValueError("names a module twice")
    return tuple(name for name in MODULES if name in value)


def _validation(value: object) -> float | str | list[object] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("has no rows; 0 holds none out")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a share to hold out, rows, or a data set's id")
    if not 0 <= value < 1:
        raise ValueError("a share is at least 0 and below 1")
    return float(value)


_PART_FIELDS = {"type": {"const": "text"}, "text": {"type": "string"}}
_PART = {"type": "object", "properties": _PART_FIELDS, "required": list(_PART_FIELDS)}
_TURN_FIELDS = {
    "role": {"enum": ["system", "developer", "user", "assistant"]},
    "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]},
    "weight": {"enum": [0, 1, None], "default": 1, "description": "0: the assistant's turn is not trained on"},
}
_TURN = {"type": "object", "properties": _TURN_FIELDS, "required": ["role", "content"]}
_ROW_FIELDS: tuple[dict[str, object], ...] = (
    {"prompt": {"type": "string"}, "completion": {"type": "string"}},
    {"messages": {"type": "array", "items": _TURN, "description": "the last turn is the assistant's"}},
    {"text": {"type": "string"}},
)
_ROW = {"anyOf": [{"type": "object", "properties": of, "required": list(of)} for of in _ROW_FIELDS]}
_ROWS = {"type": "array", "minItems": 1, "items": _ROW}

TargetModules = Annotated[
    tuple[str, ...],
    BeforeValidator(_target_modules),
    WithJsonSchema(
        {"anyOf": [{"const": ALL_LINEAR}, {"type": "array", "minItems": 1, "items": {"enum": list(MODULES)}}]}
    ),
]
Validation = Annotated[
    float | str | list[object] | None,
    BeforeValidator(_validation),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                _ROWS,
                {"type": "string"},
                {"type": "null"},
            ]
        }
    ),
]
Rows = Annotated[list[object], Field(min_length=1), WithJsonSchema(_ROWS)]


class LoraBody(Body):
    """The adapter's shape. With `start_from` it is the parent's; full fine-tuning has none."""

    rank: int = Field(LoraSpec.rank, ge=1, le=MAX_TRAINED_RANK)
    alpha: float = Field(LoraSpec.alpha, gt=0, le=65536)
    dropout: float = Field(LoraSpec.dropout, ge=0, lt=1)
    target_modules: TargetModules = Field(
        LoraSpec.target_modules, description=f'"{ALL_LINEAR}", or names of linear modules'
    )
    init: Init = Field(
        LoraSpec.init, description="of a new adapter; pissa and olora are published with twice the rank"
    )
    use_rslora: bool = Field(LoraSpec.use_rslora, description="scale by alpha/√rank instead of alpha/rank")


class TrainingBody(Body):
    """How it is trained."""

    epochs: int = Field(TrainingSpec.epochs, ge=1, le=10_000)
    max_steps: Steps | None = Field(TrainingSpec.max_steps, description="optimizer steps, instead of epochs")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="the highest of the schedule; null: "
        + ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items()),
    )
    batch_size: int = Field(TrainingSpec.batch_size, ge=1, le=4096, description="rows of an optimizer step")
    max_length: int = Field(
        TrainingSpec.max_length, ge=2, le=1 << 20, description="tokens of a row; the base may allow fewer"
    )
    schedule: Schedule = TrainingSpec.schedule
    warmup_ratio: float = Field(TrainingSpec.warmup_ratio, ge=0, le=1)
    weight_decay: float = Field(TrainingSpec.weight_decay, ge=0, le=10)
    max_grad_norm: float = Field(TrainingSpec.max_grad_norm, gt=0)
    seed: int = Field(TrainingSpec.seed, ge=0, le=MAX_SEED)
    eval_steps: Steps | None = Field(
        TrainingSpec.eval_steps,
        description="measure the held-out loss this often, and keep the best weights; null: at the end only",
    )
    checkpoint_steps: Steps | None = Field(
        TrainingSpec.checkpoint_steps, description="null: about every 30 seconds"
    )
    early_stopping_patience: Steps | None = Field(
        TrainingSpec.early_stopping_patience,
        description="end after this many evaluations without a lower loss; needs eval_steps",
    )
    packing: bool = Field(TrainingSpec.packing, description="lay several short rows out as one")
    overlong: Overlong = Field(TrainingSpec.overlong, description="what becomes of rows beyond max_length")


class TrainBody(Body):
    """POST /train."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "codes", "data": [{"prompt": "404 ", "completion": "Not Found"}], "lora": {"rank": 8}},
                {"name": "tweets", "dataset": "ds-…", "validation": 0.1, "publish_if": "improves_base"},
            ]
        }
    )

    name: str = Field(min_length=1, max_length=MAX_NAME, description="the adapter that becomes a version of it")
    data: Rows | None = Field(None, description="the rows; or give a dataset")
    dataset: str | None = Field(None, max_length=64, description="an id from POST /datasets, instead of data")
    validation: Validation = Field(
        None, description="a share to hold out, rows, or a data set's id; null: 0.1 from 20 rows up, else none"
    )
    method: Method = Field(JobSpec.method, description="full: every weight of a private copy, never published")
    lora: LoraBody = LoraBody.model_validate({})
    training: TrainingBody = TrainingBody.model_validate({})
    start_from: str | None = Field(
        None, max_length=2 * MAX_NAME + 1, description="an adapter to go on from: name, name@3 or name@alias"
    )
    publish_if: PublishIf = Field(JobSpec.publish_if, description="what the held-out loss must be below")
    alias: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_NAME,
        description="points to the new version; latest as well, where a job would not move that by itself",
    )
    description: str = Field(JobSpec.description, max_length=MAX_DESCRIPTION)


class Progress(BaseModel):
    step: int
    total_steps: int
    epoch: float
    tokens: int = Field(description="non-padding inputs of training steps so far")
    tokens_per_second: float | None
    eta_seconds: float | None


class JobMetrics(BaseModel):
    train_loss: float | None = Field(description="nats per counted token, of the last step")
    eval_loss: float | None = Field(description="the held-out rows'")
    base_eval_loss: float | None = Field(description="the untouched base's, on the same rows")


class PublishedAdapter(BaseModel):
    name: str
    version: int
    digest: str


class RowCounts(BaseModel):
    """The rows as the job has them, tokenized."""

    digest: str
    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    validation_digest: str | None
    validation_rows: int
    validation_truncated: int
    overlap: int = Field(description="held-out rows that are training rows too")


class JobAnswer(BaseModel):
    id: str
    project: str = Field(description="whose it is: names in it are that project's own")
    key: str | None = Field(description="the id of the key that submitted it; null: none")
    kind: Literal["train", "merge"]
    name: str
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    position: int | None = Field(
        description="place of a queued job in the order of turns, from 1: it counts its project's older queued "
        "jobs, and other projects' jobs that come first, running ones included; null unless it is queued"
    )
    pausing: bool = Field(description="it was told to pause, and its worker hasn't let go yet")
    progress: Progress
    metrics: JobMetrics
    adapter: PublishedAdapter | None
    error: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    files_removed_at: str | None = Field(description="null until what it left was removed; its rows go as it ends")
    config: dict[str, object] = Field(description="the body with every default filled in")
    data: RowCounts | None = Field(description="null for a merge")
    attempt: int = Field(description="how often a worker took it up")


class JobList(BaseModel):
    jobs: list[JobAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


class EventAnswer(BaseModel):
    seq: int
    at: str
    level: Literal["info", "warning", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, object]


class PreviewToken(BaseModel):
    text: str
    trained: bool


class PreviewRow(BaseModel):
    row: int = Field(description="counted from 0 among those that are trained on")
    tokens: list[PreviewToken]
    more: int = Field(description="tokens that aren't shown")


class DryRunAnswer(BaseModel):
    dry_run: Literal[True]
    name: str
    data: RowCounts
    steps: int = Field(description="of the optimizer, in all")
    estimate: Estimate
    preview: list[PreviewRow]
    config: dict[str, object]
    warnings: list[str] = Field(description="of start_from and of the rows; a job has them as events")


class DatasetAnswer(BaseModel):
    id: str
    filename: str | None = Field(description="as it was first uploaded; null where that was not kept yet")
    format: Literal["jsonl", "csv"]
    rows: int
    bytes: int = Field(description="of the first upload; quotas count what its rows take as JSON")
    kinds: dict[str, int] = Field(description="rows of each shape: completion, messages, text")
    digest: str
    created_at: str


class DatasetUploaded(DatasetAnswer):
    warnings: list[str] = Field(description="such as that rows have fields which are not trained on")


class DatasetList(BaseModel):
    datasets: list[DatasetAnswer]
