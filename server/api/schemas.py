"""What clients send and are sent, as pydantic sees it: bounds on every field, nothing coerced, nothing ignored.

These are wire types: `generate/generation.py` turns a checked body into the engine's own. Answers are built by
hand (a model for each token would cost more than the token); their classes here only document them.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters.expression import MAX_LENGTH, MAX_NAME, MAX_PARTS, MAX_WEIGHT

MAX_SEED = (1 << 63) - 1
MAX_STOPS = 16
MAX_BIASES = 1024


class Body(BaseModel):
    """A request body: strict, closed, finite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], BeforeValidator(_as_list, str | list[str]), Field(max_length=MAX_STOPS)]


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]


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


class SamplingFields(Body):
    """How tokens are chosen, as our routes and OpenAI's have it in common. A null is the field's default."""

    temperature: float | None
    top_p: float | None
    top_k: int = Field(0, ge=0, le=1 << 31, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Biases | None = Field(None, description="token id, as a string: what is added to its logit")
    seed: int | None
    stop: StopStrings | None = Field(None, description="a string or a list; not part of the text")
    ignore_eos: bool = False


class SamplingBody(SamplingFields):
    """How tokens are chosen by our own routes."""

    max_tokens: int = Field(64, ge=1, description="prompt + max_tokens may not exceed MAX_MODEL_LEN")
    temperature: float = Field(0.7, ge=0, le=5, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="off a token's logit once the answer has it")
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="off a token's logit for each time that the answer has it"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: a random one, which the answer carries")
    n: int = Field(1, ge=1, le=16, description="choices; each is a sequence of its own")
    logprobs: int = Field(0, ge=0, le=20, description="this many likeliest tokens beside each chosen one; 0: none")


class PromptBody(Body):
    """What to go on from: exactly one of the two."""

    prompt: str | None = Field(None, min_length=1, description="text, used as it is")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=1024, description="turns, put through the base's chat template"
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


class StructureBody(Body):
    """What the answer must match: at most one of the two. It ends by itself, so `stop` does not go with them."""

    response_format: ResponseFormatBody | None = None
    regex: str | None = Field(
        None, min_length=1, max_length=8192, description="of the whole answer; Rust's syntax, without look-around"
    )


class GenerateBody(PromptBody, SamplingBody, StructureBody):
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
    warnings: list[str] = Field(description="of the adapters, such as one that was made on another base")
    choices: Sequence[Choice]
    usage: Usage
    timing: TimingAnswer


class VersionAnswer(BaseModel):
    name: str
    version: int
    kind: Literal["adapter", "composition"]
    digest: str
    parts: list[UsedAdapter] | None = Field(None, description="of a composition: flattened, pinned to versions")
    rank: int = Field(description="of a composition: its parts' together")
    alpha: float | None = Field(description="null for a composition")
    target_modules: list[str]
    parameters: int
    bytes: int = Field(description="as stored; a composition takes none")
    base_model: str | None = Field(description="as its configuration names it")
    base_digest: str | None = Field(description="of the base that it was trained on, or uploaded for")
    data_digest: str | None = Field(description="of the rows that it was trained on")
    config: dict[str, object] = Field(description="its shape, and how it was made")
    metrics: dict[str, float]
    parent: str | None = Field(description="what it was made from, pinned to versions")
    job_id: str | None
    created_at: str
    resident: bool = Field(description="in the engine's memory now")
    warnings: list[str] = Field(description="such as that it was made on another base; most have none")


class AdapterAnswer(BaseModel):
    name: str
    kind: Literal["adapter", "composition"]
    latest: int
    aliases: dict[str, int] = Field(description="all but latest")
    parts: list[UsedAdapter] | None = Field(None, description="of a composition: its latest version's")
    versions: list[VersionAnswer]
    resident: bool


class AdapterList(BaseModel):
    adapters: list[AdapterAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")
