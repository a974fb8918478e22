"""The bodies of /v1/chat/completions and /v1/completions, with OpenAI's fields and defaults.

OpenAI's fields that aren't supported are refused by name, unless their value switches them off. Labels, such as
`user` and `metadata`, change no answer, so they are accepted. `CallBody.ineffective` names them for a warning.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from adapters.expression import MAX_LENGTH
from server.api.openapi import Responses
from server.api.schemas import Body, PromptLogprobs, ResponseFormatBody, SamplingFields, StructuredOutputsBody
from server.model.text.chat import joined_parts

MAX_PROMPTS = 128
DEFAULT_COMPLETION_TOKENS = 16

_OFF: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    # fields of messages
    "refusal": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "annotations": ([],),
    # fields of completions
    "suffix": ("",),
}
"""OpenAI's fields that are not supported, and the values besides null that switch them off."""

_TOOLS = ("tools", "functions")
"""Fields that several libraries use by default to ask for structured answers."""


def _refuse(value: object, info: ValidationInfo) -> None:
    assert info.field_name is not None
    if value is not None and value not in _OFF[info.field_name]:
        instead = " (for JSON by a schema, give response_format)" if info.field_name in _TOOLS else ""
        raise ValueError(f"is not supported here: leave it out{instead}")


Unsupported = Annotated[None, BeforeValidator(_refuse), Field(description="not supported")]


_LABEL = "changes nothing"
_LABELS = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "tool_choice",
    "parallel_tool_calls",
)


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk with the usage and no choices")
    include_obfuscation: bool | None = Field(None, description=_LABEL)


class CallBody(SamplingFields):
    """The fields of both calls. OpenAI's client sends those that aren't OpenAI's in `extra_body`."""

    model: str = Field(min_length=1, max_length=MAX_LENGTH, description="the base's name or an adapter expression")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: greedy")
    top_p: float | None = Field(1.0, ge=0, le=1)
    n: int | None = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    prompt_logprobs: PromptLogprobs = None
    structured_outputs: StructuredOutputsBody | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description=_LABEL)

    @property
    def ineffective(self) -> list[str]:
        """Names of the given fields that change nothing, except those whose value asks for nothing."""
        given = [name for name in _LABELS if getattr(self, name, None) not in (None, False, {}, "none")]
        pads = self.stream_options is not None and self.stream_options.include_obfuscation
        return [*given, "stream_options.include_obfuscation"] if pads else given

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("is only allowed with stream: true")
        return value

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessageBody(Body):
    """A turn: a text, or parts of text, which are joined without a separator. `developer` means `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(joined_parts, str | list[dict[str, str]] | None)] = Field(
        description="null: an empty text"
    )
    name: str | None = Field(None, description=_LABEL)
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None


class ChatBody(CallBody):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessageBody] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, description="null: up to 1,024, as the context allows")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormatBody | None = None
    continue_final_message: bool | None = Field(
        False, description="the answer goes on in the last message, which is the assistant's"
    )
    add_generation_prompt: bool | None = Field(
        None, description="vLLM's clients send false with continue_final_message; may be left out"
    )
    safety_identifier: str | None = Field(None, description=_LABEL)
    prompt_cache_key: str | None = Field(None, description=_LABEL)
    store: bool | None = Field(None, description=_LABEL)
    metadata: dict[str, str] | None = Field(None, description=_LABEL)
    tool_choice: Literal["none", "auto"] | None = Field(None, description=_LABEL)
    parallel_tool_calls: bool | None = Field(None, description=_LABEL)
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    modalities: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    service_tier: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None

    @property
    def ineffective(self) -> list[str]:
        names = super().ineffective
        if any(message.name is not None for message in self.messages):
            names.append("messages[].name")
        if any(message.content is None for message in self.messages):
            names.append("messages[].content: null")
        return names


Prompt = str | tuple[int, ...]
"""A text, or token ids."""


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Return the prompts of the field `prompt`: one or several. Raise ValueError if it has another form."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"must be a text, an array of token ids, or an array of 1 to {MAX_PROMPTS} of either")
    return tuple(_prompt(number, item) for number, item in enumerate(value))


def _prompt(number: int, value: object) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(map(_is_token, value)):
        return tuple(value)
    raise ValueError(f"number {number} is neither a text nor an array of token ids, or it is empty")


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class CompletionBody(CallBody):
    """The body of POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]
    max_tokens: int | None = Field(DEFAULT_COMPLETION_TOKENS, ge=0, description="0 with echo or prompt_logprobs")
    echo: bool | None = Field(
        False,
        description="the text begins with the prompt, and `logprobs` lists each token of the prompt and each "
        "generated one, the end token too",
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, description="only n, or left out")
    suffix: Unsupported = None


WARNING = "X-Smolora-Warning"
"""The header with a warning, since OpenAI's answers have no field for warnings."""


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorBody


REFUSALS: Responses = {
    "4XX": {
        "model": ErrorAnswer,
        "description": "400: a bad field, `param` is its name. 401: no valid key. 404: an unknown model. "
        "413: too large. 429: the queue is full; see `Retry-After`",
    },
    503: {
        "model": ErrorAnswer,
        "description": "Not ready, draining, the engine is dead or the disk is full; see `Retry-After`",
    },
    504: {"model": ErrorAnswer, "description": "It took longer than `SMOLORA_REQUEST_TIMEOUT`"},
}


def answers_with(example: object) -> dict[str, object]:
    """Return the OpenAPI description of a route's response with status 200, with an example of the answer."""
    return {
        "description": "The answer; with `stream`, its chunks as server-sent events",
        "content": {"application/json": {"example": example}},
        "headers": {
            WARNING: {
                "schema": {"type": "string"},
                "description": "about an adapter, such as one made on another base, or fields that change nothing",
            }
        },
    }
