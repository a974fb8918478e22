"""POST /v1/completions: what follows on each of one or several prompts, at once or as it comes."""

from collections import defaultdict
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.openai.batch import Batch, Choice, Piece
from server.api.openai.calls import begin_completions
from server.api.openai.delivery import at_once, streamed
from server.api.openai.documents import REFUSALS, answers_with
from server.api.openai.logprobs import LegacyLogprobs
from server.api.openai.schemas import CompletionBody
from server.api.routes import GENERATE, requires
from server.api.strict_route import StrictRoute

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["openai"])

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
    summary="Complete prompts, as OpenAI has it",
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
    """Of each choice its pieces, the last with its end; then the usage, if it was asked for."""
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
    """One for each choice, which counts its text; none where no logprobs were asked for."""
    num_top = body.logprobs
    return None if num_top is None else defaultdict(lambda: LegacyLogprobs(num_top))


def _head(batch: Batch) -> dict[str, object]:
    return {
        "id": f"cmpl-{batch.id}",
        "object": "text_completion",
        "created": batch.created,
        "model": batch.model,
    }
