"""The body of POST /train.

`server.api.submission` checks what depends on the base model or on the rows.
"""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from adapters.lora import MODULES
from adapters.names import MAX_NAME, near
from server.api.question_schemas import INPUT_SCHEMA, QUESTION_SCHEMA
from server.api.schemas import MAX_SEED, Body
from server.training.spec import (
    ALPHA,
    AUTO_EPOCHS,
    AUTO_STEPS,
    LEARNING_RATES,
    RSLORA_ALPHA,
    Init,
    JobSpec,
    LoraSpec,
    Method,
    Metric,
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
    """Return module names in the order of the forward pass. Raise ValueError if one is unknown or given twice."""
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
_SHAREGPT_FIELDS = {"from": {"enum": ["system", "human", "gpt"]}, "value": {"type": "string"}}
_SHAREGPT_TURN = {"type": "object", "properties": _SHAREGPT_FIELDS, "required": list(_SHAREGPT_FIELDS)}
_ROW_FIELDS: tuple[dict[str, object], ...] = (
    {"prompt": {"type": "string"}, "completion": {"type": "string"}},
    {"messages": {"type": "array", "items": _TURN, "description": "the last turn is the assistant's"}},
    {"text": {"type": "string"}},
    {"instruction": {"type": "string"}, "output": {"type": "string"}},
    {"conversations": {"type": "array", "items": _SHAREGPT_TURN}},
    {"prompt": {"type": "array", "items": _TURN}, "completion": {"type": "array", "minItems": 1, "items": _TURN}},
)
_OF_DECISIONS = {
    "input": INPUT_SCHEMA,
    "question": {"anyOf": [QUESTION_SCHEMA, {"type": ["string", "null"]}]},
    "answer": {"type": ["string", "boolean"]},
}
_DECISION = {"type": "object", "properties": _OF_DECISIONS, "required": ["input", "answer"]}
_SCHEMA = {"schema": {"description": "a JSON Schema that answers are to satisfy, for /evaluate; ignored in texts"}}
_ROW = {
    "anyOf": [
        *({"type": "object", "properties": {**of, **_SCHEMA}, "required": list(of)} for of in _ROW_FIELDS),
        _DECISION,
    ]
}
_ROWS = {"type": "array", "minItems": 1, "items": _ROW}

TargetModules = Annotated[
    tuple[str, ...],
    BeforeValidator(_target_modules),
    WithJsonSchema(
        {"anyOf": [{"const": ALL_LINEAR}, {"type": "array", "minItems": 1, "items": {"enum": list(MODULES)}}]}
    ),
]
_HELD_OUT = [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, _ROWS, {"type": "string"}]
Validation = Annotated[
    float | str | list[object] | None,
    BeforeValidator(_validation),
    WithJsonSchema({"anyOf": [*_HELD_OUT, {"type": "null"}]}),
]
Test = Annotated[float | str | list[object], BeforeValidator(_validation), WithJsonSchema({"anyOf": _HELD_OUT})]
Questions = Annotated[
    dict[str, object], WithJsonSchema({"type": "object", "additionalProperties": QUESTION_SCHEMA})
]
Rows = Annotated[list[object], Field(min_length=1), WithJsonSchema(_ROWS)]


class LoraBody(Body):
    """The adapter's shape. With `start_from`, the parent's shape is kept. Full fine-tuning has none."""

    rank: int = Field(LoraSpec.rank, ge=1, le=MAX_TRAINED_RANK)
    alpha: float | None = Field(
        None, gt=0, le=65536, description=f"null: {ALPHA:g} at every rank, or {RSLORA_ALPHA:g} with use_rslora"
    )
    dropout: float = Field(LoraSpec.dropout, ge=0, lt=1)
    target_modules: TargetModules = Field(
        LoraSpec.target_modules, description=f'"{ALL_LINEAR}", or names of linear modules'
    )
    init: Init = Field(
        LoraSpec.init, description="how a new adapter starts; pissa and olora are published with twice the rank"
    )
    use_rslora: bool = Field(LoraSpec.use_rslora, description="scale by alpha/√rank instead of alpha/rank")


class TrainingBody(Body):
    """Hyperparameters of training."""

    epochs: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description=f"passes over the rows; null: about {AUTO_STEPS} optimizer steps, "
        f"but at least {AUTO_EPOCHS[0]} and at most {AUTO_EPOCHS[1]} epochs",
    )
    max_steps: Steps | None = Field(TrainingSpec.max_steps, description="optimizer steps, instead of epochs")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak of the schedule; null: "
        + ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items()),
    )
    batch_size: int = Field(TrainingSpec.batch_size, ge=1, le=4096, description="rows in each optimizer step")
    max_length: int = Field(
        TrainingSpec.max_length, ge=2, le=1 << 20, description="most tokens of a row; the base may allow fewer"
    )
    schedule: Schedule = TrainingSpec.schedule
    warmup_ratio: float = Field(TrainingSpec.warmup_ratio, ge=0, le=1)
    weight_decay: float = Field(TrainingSpec.weight_decay, ge=0, le=10)
    max_grad_norm: float = Field(TrainingSpec.max_grad_norm, gt=0)
    seed: int = Field(TrainingSpec.seed, ge=0, le=MAX_SEED)
    eval_steps: Steps | None = Field(
        TrainingSpec.eval_steps,
        description="steps between evaluations; the weights of an earlier step are kept if they are better by "
        "publish_metric by more than one standard error; null: evaluate at the end only",
    )
    checkpoint_steps: Steps | None = Field(
        TrainingSpec.checkpoint_steps, description="null: about every 30 seconds"
    )
    early_stopping_patience: Steps | None = Field(
        TrainingSpec.early_stopping_patience,
        description="end after this many evaluations without a gain of more than one standard error; needs "
        "eval_steps and 20 held-out rows",
    )
    packing: bool = Field(TrainingSpec.packing, description="pack several short rows into one sequence")
    overlong: Overlong = Field(
        "auto",
        description="what to do with rows longer than max_length; auto: split texts into windows, cut other rows "
        "at the end, and drop rows whose prompt leaves nothing to train on",
    )


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

    name: str = Field(min_length=1, max_length=MAX_NAME, description="the adapter to publish a version of")
    data: Rows | None = Field(None, description="the rows; or give a dataset")
    dataset: str | None = Field(None, max_length=64, description="an id from POST /datasets, instead of data")
    questions: Questions | None = Field(
        None, description="the questions, by name, of rows of `input` and `answer`; the version stores them"
    )
    validation: Validation = Field(
        None, description="a share to hold out, rows, or a data set's id; null: 0.1 from 20 rows up, else none"
    )
    test: Test = Field(
        0.0,
        description="a share to set aside, rows, or a data set's id: nothing is chosen by them, and base and "
        "adapter are measured on them once, at the end",
    )
    method: Method = Field(JobSpec.method, description="full: every weight of a private copy, never published")
    lora: LoraBody = LoraBody.model_validate({})
    training: TrainingBody = TrainingBody.model_validate({})
    start_from: str | None = Field(
        None, max_length=2 * MAX_NAME + 1, description="an adapter to continue from: name, name@3 or name@alias"
    )
    publish_if: PublishIf = Field(
        JobSpec.publish_if,
        description="publish only if the new version is better than the base, better than the latest version, or "
        "not worse than the latest version; without one, the base takes its place",
    )
    publish_metric: Metric = Field(
        JobSpec.publish_metric,
        description="what publish_if, eval_steps and latest go by on held-out rows; below 20 of them, versions "
        "are compared by exact match on all rows",
    )
    alias: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_NAME,
        description="an alias for the new version; `latest` is allowed, and moves it even if the version is worse",
    )
    description: str = Field(JobSpec.description, max_length=MAX_DESCRIPTION)
