"""POST /generate, and its answers: one JSON document, or events while the text is generated.

The answers are plain dictionaries instead of models, because one is built for every piece of text of every stream.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.generation import GenerateAnswer, GenerateBody, Generation, begin
from server.api.openapi import REFUSALS
from server.api.routes import GENERATE, requires
from server.api.streams import ClientGoneError, EventStream, while_connected
from server.api.strict_route import StrictRoute
from server.engine.request import FinishReason, SampledLogprob, SequenceOutput, Timing, TokenLogprob

DONE = b"data: [DONE]\n\n"
MIN_LOGPROB = -9999.0
"""The log-probability that is sent instead of minus infinity, which JSON can't express."""
_AT_ONCE = 64
"""Number of log-probabilities to format, in some milliseconds, before other requests may run."""

Item = TypeVar("Item")
Made = TypeVar("Made")

router = APIRouter(route_class=StrictRoute, tags=["generate"])

_EVENTS = (
    'data: {"index":0,"text":"Once"}\n\n'
    'data: {"index":0,"finish_reason":"length",'
    '"usage":{"prompt_tokens":4,"completion_tokens":1,"cached_tokens":0}}\n\n'
    "data: [DONE]\n\n"
)


@router.post(
    "/generate",
    summary="Generate text",
    response_class=Response,
    responses={
        200: {
            "model": GenerateAnswer,
            "description": "The answer; with `stream`, server-sent events",
            "content": {"text/event-stream": {"example": _EVENTS}},
        },
        **REFUSALS,
    },
)
@requires(GENERATE, queued=True)
async def generate(body: GenerateBody, request: Request, services: ServicesDep) -> Response:
    """Generate text from a prompt or a conversation: with an adapter, a weighted composition of several, or
    none.
    """
    generation = await begin(services, body)
    if body.stream:
        return EventStream(stream(generation, services.base_name), generation.close)
    try:
        whole = collect(generation, services.base_name, body.logprobs, num_prompt_top=body.prompt_logprobs)
        answer = await while_connected(request.scope, request.receive, whole)
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    finally:
        await generation.close()
    return wire.answer(answer)


@dataclass
class _Choice:
    """The outputs of a choice so far."""

    pieces: list[str] = field(default_factory=list)
    prompt_logprobs: Sequence[SampledLogprob] = ()
    logprobs: list[SampledLogprob] = field(default_factory=list)
    logprob: float = 0.0  # sum over the tokens, in nats
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    num_cached: int = 0
    timing: Timing | None = None

    def add(self, output: SequenceOutput, keeps_logprobs: bool) -> None:
        if output.text:
            self.pieces.append(output.text)
        if output.scores:
            self.prompt_logprobs = output.logprobs[: len(output.scores)]
        drawn = output.logprobs[len(output.scores) :]
        for entry in drawn:
            self.logprob += max(entry.chosen.logprob, MIN_LOGPROB)
        if keeps_logprobs:
            self.logprobs += drawn
        self.finish_reason = output.finish_reason
        self.num_tokens, self.num_cached = output.num_output_tokens, output.num_cached_tokens
        self.timing = output.timing


async def collect(
    generation: Generation, model: str, num_top: int, *, sums: bool = False, num_prompt_top: int | None = None
) -> dict[str, object]:
    """Wait until every choice has ended, and return the whole answer.

    If `sums`, each choice also has its log-probability, which is the sum over its tokens. The request must then
    ask for log-probabilities. Each token of an answer has its `num_top` likeliest alternatives; if this is 0, the
    log-probabilities of single tokens are left out. The same holds for the prompt's tokens and `num_prompt_top`,
    but None leaves them out.
    """
    choices = [_Choice() for _ in range(generation.request.n)]
    async for output in generation.outputs():
        choices[output.index].add(output, num_top > 0)
    timings = [choice.timing for choice in choices if choice.timing is not None]
    form = partial(sampled_logprob, num_top=num_top)
    logprobs = [await in_turns(form, choice.logprobs) if num_top else None for choice in choices]
    of_prompt: dict[str, object] = {}
    if num_prompt_top is not None:
        form = partial(sampled_logprob, num_top=num_prompt_top)
        of_prompt["prompt_logprobs"] = [None, *await in_turns(form, choices[0].prompt_logprobs)]
    return {
        **_head(generation, model),
        "choices": [
            {
                "index": index,
                "text": "".join(choice.pieces),
                "finish_reason": choice.finish_reason,
                "logprobs": logprobs[index],
                **({"logprob": choice.logprob} if sums else {}),
            }
            for index, choice in enumerate(choices)
        ],
        **of_prompt,
        "usage": _usage(
            generation,
            sum(choice.num_tokens for choice in choices),
            # choices share their prompt: the first choice computes it, and the others find it in the cache
            min(choice.num_cached for choice in choices),
        ),
        "timing": _timing(timings),
    }


async def stream(generation: Generation, model: str) -> AsyncIterator[bytes]:
    """Yield server-sent events: one for each piece of text, a last one for each choice, and `[DONE]` at the end.

    A token's log-probability is in the first event of its choice that is sent after the token was generated.
    """
    with_logprobs = generation.request.sampling.logprobs > 0
    pending: dict[int, list[dict[str, object]]] = {}
    async for output in generation.outputs():
        if with_logprobs:
            pending.setdefault(output.index, []).extend(map(sampled_logprob, output.logprobs))
        if output.text:
            piece: dict[str, object] = {"index": output.index, "text": output.text}
            if with_logprobs:
                piece["logprobs"] = pending.pop(output.index)
            yield wire.event(piece)
        if output.finish_reason is not None:
            last = {"index": output.index, **ending(generation, model, output)}
            if rest := pending.pop(output.index, None):
                last["logprobs"] = rest
            yield wire.event(last)
    yield DONE


def ending(generation: Generation, model: str, output: SequenceOutput) -> dict[str, object]:
    """Return what a stream says at the end of a choice, whose last output is `output`."""
    return {
        "finish_reason": output.finish_reason,
        "usage": _usage(generation, output.num_output_tokens, output.num_cached_tokens),
        "timing": _timing([output.timing] if output.timing else []),
        **_head(generation, model),
    }


def _head(generation: Generation, model: str) -> dict[str, object]:
    return {
        "id": generation.id,
        "model": model,
        "adapters": [
            {"name": part.name, "version": part.version, "digest": part.digest, "weight": part.weight}
            for part in generation.parts
        ],
        "seed": generation.request.sampling.seed,
        "warnings": list(generation.warnings),
    }


def _usage(generation: Generation, num_tokens: int, num_cached: int) -> dict[str, int]:
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "cached_tokens": num_cached,
    }


def _timing(timings: Sequence[Timing]) -> dict[str, float]:
    """Return the times from submission to the first choice's start, the first token and the last choice's end."""
    return {
        "queue_ms": _ms(min((timing.queue for timing in timings), default=0.0)),
        "ttft_ms": _ms(min((timing.first_token for timing in timings), default=0.0)),
        "total_ms": _ms(max((timing.total for timing in timings), default=0.0)),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


async def in_turns(make: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """Return `make(item)` for each item. Let other requests run in between: a long answer may take a second."""
    made: list[Made] = []
    for start in range(0, len(items), _AT_ONCE):
        made += map(make, items[start : start + _AT_ONCE])
        await asyncio.sleep(0)
    return made


def sampled_logprob(entry: SampledLogprob, num_top: int | None = None) -> dict[str, object]:
    """Return a token with its log-probability in nats, and up to `num_top` of the likeliest alternatives."""
    return {**_token(entry.chosen), "top": [_token(token) for token in entry.top[:num_top]]}


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": max(token.logprob, MIN_LOGPROB)}
