"""POST /v1/chat/completions and POST /v1/completions, at once or streamed."""

from collections import defaultdict
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.openai.batch import Batch, Choice, Piece, at_once, streamed
from server.api.openai.calls import begin_chat, begin_completions
from server.api.openai.logprobs import LegacyLogprobs, of_chat, of_whole_chat
from server.api.openai.schemas import REFUSALS, ChatBody, CompletionBody, answers_with
from server.api.routes import GENERATE, requires
from server.api.strict_route import StrictRoute

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
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": await of_whole_chat(choice.logprobs, body.top_logprobs or 0) if body.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in await batch.collect()
    ]
    return {**_chat_head(batch, "chat.completion"), "choices": choices, "usage": batch.usage}


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
    if body.stream:
        return streamed(batch, _chunks(batch, body))
    return await at_once(request, batch, _whole(batch, body))


async def _whole(batch: Batch, body: CompletionBody) -> dict[str, object]:
    forms = _logprob_forms(body)
    choices = [_choice(choice, forms) for choice in await batch.collect()]
    return {**_head(batch), "choices": choices, "usage": batch.usage}


async def _chunks(batch: Batch, body: CompletionBody) -> AsyncIterator[bytes]:
    """Yield events: each choice's pieces, and then the usage if the client asked for it."""
    head, forms = _head(batch), _logprob_forms(body)
    tail: dict[str, object] = {"usage": None} if body.includes_usage else {}
    async for piece in batch.pieces():
        if piece.text or piece.finish_reason is not None or (body.logprobs is not None and piece.logprobs):
            yield wire.event({**head, "choices": [_choice(piece, forms)], **tail})
    if body.includes_usage:
        yield wire.event({**head, "choices": [], "usage": batch.usage})


def _choice(piece: Piece | Choice, forms: dict[int, LegacyLogprobs] | None) -> dict[str, object]:
    return {
        "text": piece.text,
        "index": piece.index,
        "logprobs": None if forms is None else forms[piece.index].of(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def _logprob_forms(body: CompletionBody) -> dict[int, LegacyLogprobs] | None:
    """Return a LegacyLogprobs for each choice, or None if the client asked for no log-probabilities."""
    num_top = body.logprobs
    return None if num_top is None else defaultdict(lambda: LegacyLogprobs(num_top))


def _head(batch: Batch) -> dict[str, object]:
    return {
        "id": f"cmpl-{batch.id}",
        "object": "text_completion",
        "created": batch.created,
        "model": batch.model,
    }
