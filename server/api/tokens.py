"""Tokens of texts, in vLLM's form: POST /tokenize, POST /detokenize and GET /tokenizer_info.

They need no engine. All adapters share the base's tokenizer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from adapters.errors import InvalidInput
from adapters.expression import MAX_LENGTH
from server.api import wire
from server.api.deps import Services, ServicesDep
from server.api.generation import PromptBody, encoded, length_of, prompt_fault
from server.api.openapi import REFUSALS
from server.api.routes import READ, requires
from server.api.schemas import Answer, Body, TokenId
from server.api.strict_route import StrictRoute
from server.model.text.chat import ChatMessage, ConversationForm

router = APIRouter(route_class=StrictRoute, tags=["tokens"])

Model = Annotated[
    str | None, Field(max_length=MAX_LENGTH, description="ignored: all adapters share the base's tokenizer")
]


class TokenizeBody(PromptBody):
    """The body of POST /tokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Once upon a time"}]})

    model: Model = None
    add_special_tokens: bool | None = Field(
        None,
        description="of a prompt. true or null: its tokens in /generate, where names of special tokens are plain "
        "text. false: its tokens as a rendered chat template, where they are special tokens",
    )
    add_generation_prompt: bool | None = Field(
        None, description="end messages with the start of the assistant's next turn; null: yes, unless continued"
    )
    return_token_strs: bool | None = False


class TokenizeAnswer(Answer):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int = Field(description="the most tokens of a prompt and its answer")
    tokens: list[int]
    token_strs: list[str] | None = Field(
        None, description="in the tokenizer's spelling; only with return_token_strs"
    )


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: Model = None
    tokens: list[TokenId]


class DetokenizeAnswer(Answer):
    """The answer of POST /detokenize."""

    prompt: str = Field(description="the text, with the names of special tokens")


class TokenizerInfo(BaseModel):
    """The answer of GET /tokenizer_info, which also has the special tokens, such as `eos_token`."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str = Field(description="a class of the library transformers")
    chat_template: str | None = None
    model_max_length: int


@router.post(
    "/tokenize",
    summary="Tokenize",
    response_class=Response,
    responses={200: {"model": TokenizeAnswer, "description": "The tokens"}, **REFUSALS},
)
@requires(READ)
async def tokenize(body: TokenizeBody, services: ServicesDep) -> Response:
    """Return the token ids of a prompt or a conversation. They count towards the key's `tokens_per_minute`."""
    encode, length, texts, field = _encoding(services, body)
    await services.access.rates.take(services.principal, "tokens", 0)
    ids = list(await encoded(services, encode, length, texts, field, lambda faults: InvalidInput(faults[:1])))
    await services.access.rates.charge(services.principal, "tokens", len(ids))
    answer = {"count": len(ids), "max_model_len": services.max_num_tokens, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [services.tokenizer.backend.id_to_token(token_id) for token_id in ids]
    return wire.answer(answer)


def _encoding(
    services: Services, body: TokenizeBody
) -> tuple[Callable[[], Sequence[int]], int, Sequence[str], str]:
    """Return a function that encodes the prompt, the length of all texts, the texts, and the field's name."""
    encoder, continues = services.encoder, body.continue_final_message
    if body.messages is not None and body.prompt is None:
        if continues and body.add_generation_prompt:
            raise InvalidInput.of("add_generation_prompt", "can't be true with continue_final_message")
        turns = [ChatMessage(message.role, message.content) for message in body.messages]
        form: ConversationForm = "whole" if body.add_generation_prompt is False else "next turn"
        encode = partial(encoder.messages, turns, "open" if continues else form)
        return encode, length_of(turns), ["".join(turn.content for turn in turns)], "messages"
    if body.prompt is None or body.messages is not None or continues:
        raise prompt_fault(body)
    is_rendered = body.add_special_tokens is False
    encode = partial(encoder.rendered if is_rendered else encoder.prompt, body.prompt)
    return encode, len(body.prompt), [body.prompt], "prompt"


@router.post(
    "/detokenize",
    summary="Detokenize",
    response_class=Response,
    responses={200: {"model": DetokenizeAnswer, "description": "The text"}, **REFUSALS},
)
@requires(READ)
async def detokenize(body: DetokenizeBody, services: ServicesDep) -> Response:
    """Return the text of token ids. They count towards the key's `tokens_per_minute`."""
    if body.tokens and max(body.tokens) >= services.encoder.num_tokens:
        raise InvalidInput.of("tokens", f"the base has {services.encoder.num_tokens} tokens, from 0 on")
    await services.access.rates.take(services.principal, "tokens", len(body.tokens))
    text = await encoded(services, partial(services.tokenizer.decode, body.tokens), len(body.tokens), (), "tokens")
    return wire.answer(DetokenizeAnswer(prompt=text))


@router.get(
    "/tokenizer_info",
    summary="Describe the tokenizer",
    response_class=Response,
    responses={200: {"model": TokenizerInfo, "description": "The tokenizer's configuration"}, **REFUSALS},
)
@requires(READ)
async def tokenizer_info(services: ServicesDep) -> Response:
    """Return the tokenizer's special tokens and chat template, as in a Hugging Face tokenizer_config.json."""
    template = services.tokenizer.chat_template
    return wire.answer(
        {
            **services.tokenizer.special_tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": services.max_num_tokens,
            **({} if template is None else {"chat_template": template.source}),
        }
    )
