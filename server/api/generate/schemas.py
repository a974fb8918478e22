"""What POST /generate takes and answers.

Answers are built by hand (a model for each token would cost more than the token); their classes document them.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.expression import MAX_LENGTH, MAX_PARTS, MAX_WEIGHT
from adapters.names import MAX_KEY, MAX_NAME
from server.api.schemas import MAX_SEED, Body, MessageBody, ResponseFormatBody, SamplingFields, UsedAdapter


class AdapterBody(Body):
    """One part of a composition, spelt out; the latest version where neither version nor alias is given."""

    name: str = Field(min_length=1, max_length=MAX_KEY, description="another project's: project/name")
    version: int | None = Field(None, ge=1)
    alias: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


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
    logprobs: int = Field(
        0,
        ge=0,
        le=20,
        description="this many likeliest tokens beside each chosen one; 0: none. At most 262,144 in all where the "
        "answer isn't streamed; a stream ends with an error once that many, tokens among them, wait to be read",
    )


class PromptBody(Body):
    """What to go on from: exactly one of the two."""

    prompt: str | None = Field(None, min_length=1, description="text, used as it is")
    messages: list[MessageBody] | None = Field(
        None, min_length=1, max_length=1024, description="turns, put through the base's chat template"
    )


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
