"""What clients send and are sent, as pydantic sees it: bounds on every field, nothing coerced, nothing ignored.

These are wire types: `server.api.generation` turns a checked body into the engine's own. Answers are built by
hand (a model for each token would cost more than the token); their classes here only document them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters.expression import MAX_LENGTH, MAX_NAME, MAX_PARTS, MAX_WEIGHT

MAX_SEED = (1 << 63) - 1
MAX_STOPS = 16


class Body(BaseModel):
    """A request body: strict, closed, finite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], BeforeValidator(_as_list, str | list[str]), Field(max_length=MAX_STOPS)]


class MessageBody(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class AdapterBody(Body):
    """One part of a composition, spelt out; the latest version where neither version nor alias is given."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    version: int | None = Field(None, ge=1)
    alias: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class SamplingBody(Body):
    """How tokens are chosen."""

    max_tokens: int = Field(64, ge=1, description="prompt + max_tokens may not exceed MAX_MODEL_LEN")
    temperature: float = Field(0.7, ge=0, le=5, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 31, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: a random one, which the answer carries")
    stop: StopStrings | None = Field(None, description="a string or a list; not part of the text")
    n: int = Field(1, ge=1, le=16, description="choices; each is a sequence of its own")
    logprobs: int = Field(0, ge=0, le=20, description="this many likeliest tokens beside each chosen one; 0: none")
    ignore_eos: bool = False


class PromptBody(Body):
    """What to go on from: exactly one of the two."""

    prompt: str | None = Field(None, min_length=1, description="text, used as it is")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=1024, description="turns, put through the base's chat template"
    )


class GenerateBody(PromptBody, SamplingBody):
    """POST /generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.0},
                {"messages": [{"role": "user", "content": "What is LoRA?"}], "adapter": "tweets*0.7+movies@2*0.3"},
            ]
        }
    )

    adapter: str | None = Field(
        None, max_length=MAX_LENGTH, description='an adapter expression; null or "base": the frozen base'
    )
    adapters: list[AdapterBody] | None = Field(
        None, min_length=1, max_length=MAX_PARTS, description="the same as a list; not both"
    )
    stream: bool = False


class FieldProblem(BaseModel):
    loc: list[str | int] = Field(description="its last part is the field's name")
    message: str


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]


class UsedAdapter(BaseModel):
    name: str
    version: int
    digest: str
    weight: float


class TokenLogprobAnswer(BaseModel):
    token: str
    bytes: list[int]
    logprob: float = Field(description="nats, before temperature")


class SampledLogprobAnswer(TokenLogprobAnswer):
    top: list[TokenLogprobAnswer]


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: list[SampledLogprobAnswer] | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = Field(description="of the prompt, those whose keys and values were there already")


class TimingAnswer(BaseModel):
    queue_ms: float
    ttft_ms: float
    total_ms: float


class GenerateAnswer(BaseModel):
    """What POST /generate answers where nothing is streamed."""

    id: str
    model: str
    adapters: list[UsedAdapter]
    seed: int
    choices: list[Choice]
    usage: Usage
    timing: TimingAnswer


class VersionAnswer(BaseModel):
    name: str
    version: int
    digest: str
    rank: int
    alpha: float
    target_modules: list[str]
    parameters: int
    bytes: int
    base_model: str | None
    metrics: dict[str, float]
    parent: str | None
    job_id: str | None
    created_at: str
    resident: bool = Field(description="in the engine's memory now")
    warnings: list[str]


class AdapterAnswer(BaseModel):
    name: str
    kind: Literal["adapter"]
    latest: int
    aliases: dict[str, int]
    versions: list[VersionAnswer]
    resident: bool


class AdapterList(BaseModel):
    adapters: list[AdapterAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")
