"""POST /v1/chat/completions and POST /v1/completions, at once or streamed."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.openai.batch import Batch, Choice, Piece, at_once, streamed
from server.api.openai.calls import begin_chat, begin_completions
from server.api.openai.logprobs import LegacyLogprobs, first_token, of_chat, of_prompt, of_whole_chat
from server.api.openai.schemas import REFUSALS, ChatBody, CompletionBody, answers_with
from server.api.routes import GENERATE, requires
from server.api.strict_route import StrictRoute
from server.model.text.tokenizer import BaseTokenizer

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["openai"])

_CHAT_EXAMPLE = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 1764086400,
    "model": "tweets@3",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 31, "completion_tokens": 3, "total_tokens": 34},
}


@router.post(
    "/chat/completions",
    summary="Chat, in OpenAI's form",
    response_class=Response,
    responses={200: answers_with(_CHAT_EXAMPLE), **REFUSALS},
)
@requires(GENERATE, queued=True)
async def chat(body: ChatBody, request: Request, services: ServicesDep) -> Response:
    """Generate the next message of a conversation.

    `model` is an adapter expression; the answer names its versions.
    """
    batch = await begin_chat(services, body)
    if body.stream:
        return streamed(batch, _chat_chunks(batch, body))
    return await at_once(request, batch, _whole_chat(batch, body))


async def _whole_chat(batch: Batch, body: ChatBody) -> dict[str, object]:
    collected = await batch.collect()
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": await of_whole_chat(choice.logprobs, body.top_logprobs or 0) if body.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in collected
    ]
    answer = {**_chat_head(batch, "chat.completion"), "choices": choices, "usage": batch.usage}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = await of_prompt(collected[0].prompt_logprobs, body.prompt_logprobs)
    return answer


async def _chat_chunks(batch: Batch, body: ChatBody) -> AsyncIterator[bytes]:
    """Yield events: each choice's role, pieces and end, and then the usage if the client asked for it."""
    head = _chat_head(batch, "chat.completion.chunk")
    tail: dict[str, object] = {"usage": None} if body.includes_usage else {}

    def chunk(index: int, delta: object, logprobs: object = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return wire.event({**head, "choices": [choice], **tail})

    begun: set[int] = set()
    async for piece in batch.pieces():
        if piece.index not in begun:
            begun.add(piece.index)
            yield chunk(piece.index, {"role": "assistant", "content": "", "refusal": None})
        if piece.text or (body.logprobs and piece.logprobs):
            logprobs = of_chat(piece.logprobs, body.top_logprobs or 0) if body.logprobs else None
            yield chunk(piece.index, {"content": piece.text}, logprobs)
        if piece.finish_reason is not None:
            yield chunk(piece.index, {}, reason=piece.finish_reason)
    if body.includes_usage:
        yield wire.event({**head, "choices": [], "usage": batch.usage})


def _chat_head(batch: Batch, kind: str) -> dict[str, object]:
    return {"id": f"chatcmpl-{batch.id}", "object": kind, "created": batch.created, "model": batch.model}


_EXAMPLE = {
    "id": "cmpl-0",
    "object": "text_completion",
    "created": 1764086400,
    "model": "tweets@3",
    "choices": [{"text": " time", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}


@router.post(
    "/completions",
    summary="Complete prompts, in OpenAI's form",
    response_class=Response,
    responses={200: answers_with(_EXAMPLE), **REFUSALS},
)
@requires(GENERATE, queued=True)
async def completions(body: CompletionBody, request: Request, services: ServicesDep) -> Response:
    """Continue each prompt. `model` is an adapter expression; the answer names its versions."""
    batch = await begin_completions(services, body)
    forms = _logprob_forms(batch, body, services.tokenizer)
    if body.stream:
        return streamed(batch, _chunks(batch, body, forms))
    return await at_once(request, batch, _whole(batch, body, forms))


async def _whole(batch: Batch, body: CompletionBody, forms: Sequence[LegacyLogprobs]) -> dict[str, object]:
    choices = []
    for found in await batch.collect():
        choice = _choice(found, body, forms)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = await of_prompt(found.prompt_logprobs, body.prompt_logprobs)
        choices.append(choice)
        await asyncio.sleep(0)  # a choice with many tokens takes a while: let other requests run
    return {**_head(batch), "choices": choices, "usage": batch.usage}


async def _chunks(batch: Batch, body: CompletionBody, forms: Sequence[LegacyLogprobs]) -> AsyncIterator[bytes]:
    """Yield events: each choice's pieces, and then the usage if the client asked for it."""
    head = _head(batch)
    tail: dict[str, object] = {"usage": None} if body.includes_usage else {}
    async for piece in batch.pieces():
        if piece.text or piece.finish_reason is not None or (body.logprobs is not None and piece.logprobs):
            yield wire.event({**head, "choices": [_choice(piece, body, forms)], **tail})
    if body.includes_usage:
        yield wire.event({**head, "choices": [], "usage": batch.usage})


def _choice(piece: Piece | Choice, body: CompletionBody, forms: Sequence[LegacyLogprobs]) -> dict[str, object]:
    entries = (*piece.prompt_logprobs, *piece.logprobs) if body.echo else piece.logprobs
    return {
        "text": piece.text,
        "index": piece.index,
        "logprobs": forms[piece.index].of(entries) if forms else None,
        "finish_reason": piece.finish_reason,
    }


def _logprob_forms(batch: Batch, body: CompletionBody, tokenizer: BaseTokenizer) -> Sequence[LegacyLogprobs]:
    """Return a LegacyLogprobs for each choice, or none at all if the client asked for no log-probabilities."""
    if body.logprobs is None:
        return ()
    return [
        LegacyLogprobs(body.logprobs, first_token(tokenizer, batch.first_token_id(index)) if body.echo else None)
        for index in range(batch.num_choices)
    ]


def _head(batch: Batch) -> dict[str, object]:
    return {
        "id": f"cmpl-{batch.id}",
        "object": "text_completion",
        "created": batch.created,
        "model": batch.model,
    }
