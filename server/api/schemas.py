"""Schemas that several resources use. Bodies are strict: fields have bounds, and unknown fields are refused."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.access.principal import LIMITS, Quota

MAX_SEED = (1 << 63) - 1
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_CHOICES = 256
MAX_FAULTS = 10_000


class Body(BaseModel):
    """Base class of request bodies: no coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _bound_faults(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report only the number of errors if there are many: listing those of a 1 MB body takes 1 GB of RAM."""
        try:
            return handler(value)
        except ValidationError as error:
            if error.error_count() <= MAX_FAULTS:
                raise
            message = "has {count} validation errors, too many to list"
            raise PydanticCustomError("too_many_faults", message, {"count": error.error_count()}) from None


class Answer(BaseModel):
    """A JSON answer. It can be made from an object with its attributes. Fields that aren't set are left out."""

    # `server.api.wire` refuses NaN and infinities
    model_config = ConfigDict(from_attributes=True, ser_json_inf_nan="constants")


def _iso(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


Timestamp = Annotated[str, BeforeValidator(_iso)]
"""A time in ISO 8601. A datetime is converted."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    Annotated[list[StopString], Field(max_length=MAX_STOPS)], BeforeValidator(_as_list, str | list[str])
]


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]


TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
PromptLogprobs = Annotated[
    int | None,
    Field(
        ge=0,
        le=20,
        description="list the log-probability of each token of the prompt, with that number of the likeliest "
        "tokens; only with n 1 and without stream",
    ),
]


class MessageBody(Body):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class SamplingFields(Body):
    """The sampling fields that our routes and OpenAI's share. Null means the default."""

    temperature: float | None
    top_p: float | None
    top_k: int = Field(0, ge=0, le=1 << 31, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="below 1, repetitions become likelier")
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Biases | None = Field(None, description="token ids, as strings, and what is added to their logits")
    seed: int | None
    stop: StopStrings | None = Field(None, description="a string or a list; not part of the text")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=MAX_BIASES, description="more tokens that end the answer; their text is part of it"
    )
    min_tokens: int = Field(
        0, ge=0, description="no end token and no stop string ends the answer before it has this number of tokens"
    )
    ignore_eos: bool = False
    speculation: Literal["auto", "off"] = Field(
        "auto", description="auto: drafted tokens are verified together if that is faster; the answer is the same"
    )


class JsonSchemaBody(Body):
    """A JSON schema, with the fields that OpenAI's clients send."""

    name: str = Field("answer", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="a label")
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = Field(None, description="ignored: the answer always follows the schema")


class ResponseFormatBody(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = Field(None, description="only with the type json_schema")


class StructuredOutputsBody(Body):
    """vLLM's `structured_outputs`."""

    choice: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, max_length=MAX_CHOICES, description="the answer is one of these texts"
    )


Limit = Annotated[int, Field(ge=1, le=(1 << 53) - 1)]  # the largest integer that JavaScript keeps exact


class LimitFields(Body):
    """The limits of a key, or of all keys of a project together. Null: no limit."""

    requests_per_minute: Limit | None = Field(None, description="requests other than GET, and downloads")
    tokens_per_minute: Limit | None = Field(
        None, description="tokens of prompts and of the longest possible answers"
    )
    max_jobs: Limit | None = Field(None, description="unfinished jobs")
    max_bytes: Limit | None = Field(
        None,
        description="stored bytes of adapters, data sets and files, and of jobs with what they may still store",
    )
    max_versions: Limit | None = Field(None, description="versions of adapters and compositions")
    max_job_seconds: Limit | None = Field(None, description="the most seconds that one job may run; then it fails")
    allow_full: bool | None = Field(None, description="false: no full fine-tuning")

    @property
    def quota(self) -> Quota:
        return Quota(**{name: getattr(self, name) for name in LIMITS})

    @property
    def given_limits(self) -> dict[str, int | None]:
        """The limits that the body has, by name."""
        return {name: getattr(self, name) for name in LIMITS if name in self.model_fields_set}


class FieldProblem(Answer):
    loc: list[str | int] = Field(description="its last part is the field's name")
    message: str


class ProblemHint(Answer):
    code: str = Field(description="never changes")
    text: str = Field(description="the part of `detail` that a client may replace by its own advice")


class Problem(Answer):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]
    hint: ProblemHint | None = Field(None, description="what to do about it; absent if there is no code for that")


class UsedAdapter(Answer):
    name: str
    version: int
    digest: str
    weight: float
