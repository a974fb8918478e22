"""What several resources take or answer: bounds on every field, nothing coerced, nothing ignored.

Each resource has its own `schemas.py` beside its route.
"""

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

from server.access.principal import Quota

MAX_SEED = (1 << 63) - 1
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_FAULTS = 10_000


class Body(BaseModel):
    """A request body: strict, closed, finite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _bound_faults(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A megabyte of faults takes a gigabyte, and seconds, to tell one by one."""
        try:
            return handler(value)
        except ValidationError as error:
            if error.error_count() <= MAX_FAULTS:
                raise
            message = "has {count} faults, which are too many to tell"
            raise PydanticCustomError("too_many_faults", message, {"count": error.error_count()}) from None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    Annotated[list[StopString], Field(max_length=MAX_STOPS)], BeforeValidator(_as_list, str | list[str])
]


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]


class MessageBody(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class SamplingFields(Body):
    """How tokens are chosen, as our routes and OpenAI's have it in common. A null is the field's default."""

    temperature: float | None
    top_p: float | None
    top_k: int = Field(0, ge=0, le=1 << 31, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="below 1, what was said is likelier")
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Biases | None = Field(None, description="token id, as a string: what is added to its logit")
    seed: int | None
    stop: StopStrings | None = Field(None, description="a string or a list; not part of the text")
    ignore_eos: bool = False
    speculation: Literal["auto", "off"] = Field(
        "auto", description="auto: tokens that may come are computed ahead where that is faster; the same answer"
    )


class JsonSchemaBody(Body):
    """A schema, and what OpenAI's clients send with it."""

    name: str = Field("answer", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="a label")
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = Field(None, description="the answer always follows the schema, with either value")


class ResponseFormatBody(Body):
    """OpenAI's field of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = Field(None, description="with the type json_schema alone")


Limit = Annotated[int, Field(ge=1, le=(1 << 53) - 1)]  # the largest integer that JavaScript keeps exact


class LimitFields(Body):
    """The limits of a key, or of all keys of a project together. Null: no limit."""

    requests_per_minute: Limit | None = Field(None, description="requests other than GET")
    tokens_per_minute: Limit | None = Field(None, description="of prompts, and of answers as long as they may be")
    max_jobs: Limit | None = Field(None, description="that haven't ended")
    max_bytes: Limit | None = Field(None, description="stored: adapters, data sets and files")

    @property
    def quota(self) -> Quota:
        return Quota(**{name: getattr(self, name) for name in LimitFields.model_fields})


class FieldProblem(BaseModel):
    loc: list[str | int] = Field(description="its last part is the field's name")
    message: str


class ProblemHint(BaseModel):
    code: str = Field(description="never changes")
    text: str = Field(description="the part of `detail` that a client may replace by its own advice")


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]
    hint: ProblemHint | None = Field(None, description="what to do about it; absent if there is no code for that")


class UsedAdapter(BaseModel):
    name: str
    version: int
    digest: str
    weight: float
