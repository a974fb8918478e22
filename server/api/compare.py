"""POST /compare: one prompt under several adapter expressions, side by side, with scores for given texts.

Every answer and every score is a separate request to the engine. All requests are submitted together, so that they
run in the same steps. Requests with the same expression share the prompt's keys and values. All answers use the
same random stream. A comparison is accepted as a whole or refused as a whole.

A stream has one event for each step of each answer. With `reference`, the tokens of an answer are scored under
that expression once the answer has ended. So one request suffices to show what an adapter changed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from adapters.errors import FieldError, InvalidInput
from adapters.expression import MAX_LENGTH, Term, parse
from server.api import generate, wire
from server.api.deps import Services, ServicesDep
from server.api.generation import (
    Choice,
    GenerateAnswer,
    Generation,
    PromptBody,
    SampledLogprobAnswer,
    SamplingBody,
    StructureBody,
    adapter_terms,
    ask_queue_for,
    charge_refused,
    check_logprobs,
    check_sequences,
    close_all,
    encode_prompt,
    encoded,
    grammar_of,
    sampling_params,
    start,
)
from server.api.openapi import REFUSALS
from server.api.routes import GENERATE, requires
from server.api.streams import ClientGoneError, EventStream, while_connected
from server.api.strict_route import StrictRoute
from server.engine.request import SamplingParams
from server.errors import TryAgain

MAX_COMPARED = 16
MAX_SCORED = 16

router = APIRouter(route_class=StrictRoute, tags=["generate"])

_EVENTS = (
    'data: {"result":0,"index":0,"text":" great"}\n\n'
    'data: {"result":0,"index":0,"text":"","finish_reason":"stop"}\n\n'
    "data: [DONE]\n\n"
)


class CompareBody(PromptBody, SamplingBody, StructureBody):
    """The body of POST /compare."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "I felt", "adapters": ["base", "tweets", "tweets*0.5+movies*0.5"], "score": [" great"]}
            ]
        }
    )

    adapters: list[Annotated[str, Field(max_length=MAX_LENGTH)]] = Field(
        min_length=1, max_length=MAX_COMPARED, description='adapter expressions; "base": the frozen base'
    )
    score: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=MAX_SCORED, description="continuations to score by their log-probability"
    )
    stream: bool = False
    reference: str | None = Field(
        None,
        max_length=MAX_LENGTH,
        description="only with `stream` and `logprobs`: an expression under which each answer of another one is "
        "scored, too; an answer's tokens have these log-probabilities in an event after its last",
    )


class ComparedChoice(Choice):
    logprob: float = Field(description="of the answer with its end token: the sum over its tokens, in nats")


class ScoreAnswer(BaseModel):
    text: str
    logprob: float = Field(description="the sum over its tokens, in nats")
    num_tokens: int
    logprobs: list[SampledLogprobAnswer] | None = Field(description="of each token; null if `logprobs` is 0")


class CompareResult(GenerateAnswer):
    adapter: str = Field(description="the expression, as sent")
    choices: Sequence[ComparedChoice]
    logprob: float = Field(description="the first choice's")
    scores: list[ScoreAnswer] | None


class CompareAnswer(BaseModel):
    """The answer of POST /compare, in the order of `adapters`."""

    results: list[CompareResult]


@dataclass(frozen=True)
class _Compared:
    """The generations for one adapter expression: an answer, and one generation for each text to score."""

    expression: str
    answer: Generation
    scores: tuple[Generation, ...]
    has_reference: bool
    """Whether the answer is to be scored under the body's `reference`, too."""


class Comparison:
    """An accepted comparison. Await `collect` only once. `close` aborts the requests that still run."""

    def __init__(
        self,
        services: Services,
        compared: Sequence[_Compared],
        body: CompareBody,
        prompt: tuple[int, ...],
        reference: tuple[Term, ...] | None,
    ) -> None:
        """`reference`: the terms of the body's field, or None if it has none."""
        self._services = services
        self._compared = tuple(compared)
        self._texts = body.score
        self._num_top = body.logprobs
        self._model = services.base_name
        self._prompt = prompt
        self._reference = reference
        self._references: list[Generation] = []

    async def collect(self) -> dict[str, object]:
        """Return the whole answer. If the engine ends one of the requests with an error, raise that error."""
        tasks = [asyncio.ensure_future(self._result(place, one)) for place, one in enumerate(self._compared)]
        try:
            return {"results": await asyncio.gather(*tasks)}
        finally:
            for task in tasks:
                task.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: the steps of all answers as they come, and `[DONE]` at the end.

        `result` in an event is the index of the expression. The next event is awaited only after the last one was
        taken. If the engine ends one of the requests with an error, raise that error.
        """
        queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)

        async def forward(place: int, compared: _Compared) -> None:
            try:
                async for event in self._events(place, compared):
                    await queue.put(wire.event({"result": place, **event}))
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

        tasks = [asyncio.ensure_future(forward(place, one)) for place, one in enumerate(self._compared)]
        try:
            num_running = len(tasks)
            while num_running:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    num_running -= 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
        yield generate.DONE

    async def close(self) -> None:
        """Abort the requests that still run, and release the adapters. Idempotent."""
        submitted = [generation for one in self._compared for generation in (one.answer, *one.scores)]
        await close_all([*submitted, *self._references])

    async def _events(self, place: int, compared: _Compared) -> AsyncIterator[dict[str, object]]:
        token_ids: dict[int, list[int]] = {}
        with faults_of_item(place):
            async for output in compared.answer.outputs():
                token_ids.setdefault(output.index, []).extend(one.chosen.token_id for one in output.logprobs)
                event: dict[str, object] = {"index": output.index, "text": output.text}
                if self._num_top:
                    event["logprobs"] = [generate.sampled_logprob(one, self._num_top) for one in output.logprobs]
                if output.finish_reason is not None:
                    event |= generate.ending(compared.answer, self._model, output)
                yield event
        if compared.has_reference:
            for index, answer in token_ids.items():
                yield {"index": index, "reference": await self._scores(tuple(answer))}

    async def _scores(self, answer: tuple[int, ...]) -> list[dict[str, object]] | None:
        """Score an answer under the reference. Return None if the queue is full, as the answer itself was sent."""
        scoring = SamplingParams(max_tokens=0, temperature=0.0, logprobs=self._num_top)
        try:
            generation = await start(
                *(self._services, self._reference or (), self._prompt + answer, scoring, 1, "reference"),
                scored_from=len(self._prompt),
                num_taken=0,
                is_booked=True,
            )
        except TryAgain:
            return None
        self._references.append(generation)
        (output,) = [output async for output in generation.outputs()]
        return await generate.in_turns(generate.sampled_logprob, output.logprobs)

    async def _result(self, place: int, compared: _Compared) -> dict[str, object]:
        scores = None
        with faults_of_item(place):
            answer = await generate.collect(compared.answer, self._model, sums=True, num_top=self._num_top)
            if self._texts is not None:
                scored = zip(self._texts, compared.scores, strict=True)
                scores = [await _score(text, generation, self._num_top) for text, generation in scored]
        choices = answer["choices"]
        assert isinstance(choices, list)
        return {"adapter": compared.expression, **answer, "logprob": choices[0]["logprob"], "scores": scores}


async def compare(services: Services, body: CompareBody) -> Comparison:
    """Submit all requests of a comparison to the engine. If one is refused, abort all and raise its error."""
    terms = [_terms(services, place, expression) for place, expression in enumerate(body.adapters)]
    reference = _reference(services, body)
    num_sequences = len(terms) * (body.n + len(body.score or ()))
    if num_sequences > body.n:
        check_sequences(num_sequences, services.engine.max_in_flight, "adapters")
    ask_queue_for(services, num_sequences)
    prompt = await encode_prompt(services, body, body.max_tokens)
    continuations = await _continuations(services, len(prompt), body.score or ())
    if not body.stream:
        check_logprobs(len(terms) * (body.n * body.max_tokens + sum(map(len, continuations))), body.logprobs)
    grammar = grammar_of(body.response_format, body.structured_outputs, body.regex)
    sampling = sampling_params(body, body.max_tokens, max(body.logprobs, 1))
    scoring = SamplingParams(max_tokens=0, temperature=0.0, logprobs=body.logprobs)
    num_answer_tokens = len(prompt) + body.n * body.max_tokens
    num_tokens = len(terms) * (num_answer_tokens + sum(len(prompt) + len(one) for one in continuations))
    if reference is not None:
        num_tokens += num_answer_tokens * sum(one != reference for one in terms)
    started: list[Generation] = []
    compared: list[_Compared] = []
    try:
        for expression, named in zip(body.adapters, terms, strict=True):
            num_taken = 0 if started else num_tokens  # the first request is charged for the tokens of all requests
            answer = await start(
                services, named, prompt, sampling, body.n, "adapters", grammar, num_taken=num_taken
            )
            started.append(answer)
            # the scores use the same versions as the answer, even if an alias moves meanwhile
            pinned = [Term(part.name, part.version, weight=part.weight) for part in answer.parts]
            scores = []
            for continuation in continuations:
                token_ids = prompt + continuation
                score = await start(
                    *(services, pinned, token_ids, scoring, 1, "adapters"),
                    scored_from=len(prompt),
                    num_taken=0,
                    is_booked=True,
                )
                started.append(score)
                scores.append(score)
            has_reference = reference is not None and named != reference
            compared.append(_Compared(expression, answer, tuple(scores), has_reference))
    except BaseException:
        await close_all(started)
        raise
    return Comparison(services, compared, body, prompt, reference)


def _reference(services: Services, body: CompareBody) -> tuple[Term, ...] | None:
    """Return the terms of the field `reference`, or None if it is null. Raise InvalidInput if it is at fault."""
    if body.stream and body.score is not None:
        raise InvalidInput.of("score", "is not available in a stream: leave out one of the two")
    if body.reference is None:
        return None
    if not (body.stream and body.logprobs):
        raise InvalidInput.of("reference", "needs stream, and logprobs of at least 1")
    return () if body.reference == services.base_name else parse(body.reference, "reference")


def _terms(services: Services, place: int, expression: str) -> tuple[Term, ...]:
    """Parse the adapter expression at index `place` of the field `adapters`."""
    with faults_of_item(place):
        return adapter_terms(expression, None, services.base_name)


@contextmanager
def faults_of_item(place: int) -> Iterator[None]:
    """Convert errors in the field `adapter` into errors in item `place` of the field `adapters`."""
    try:
        yield
    except InvalidInput as error:
        faults = [
            FieldError(("adapters",), f"item {place}: {fault.message}") if fault.loc == ("adapter",) else fault
            for fault in error.errors
        ]
        raise InvalidInput(faults, error.num_more) from None


async def _continuations(
    services: Services, num_prompt_tokens: int, texts: Sequence[str]
) -> list[tuple[int, ...]]:
    def encode() -> list[tuple[int, ...]]:
        return [tuple(services.encoder.continuation(text)) for text in texts]

    found = await encoded(services, encode, sum(map(len, texts)), texts, "score")
    for token_ids in found:
        if num_prompt_tokens + len(token_ids) > services.max_num_tokens:
            message = (
                f"a text's {len(token_ids)} tokens and the prompt's exceed the model's {services.max_num_tokens}"
            )
            await charge_refused(services, sum(map(len, found)))
            raise InvalidInput.of("score", message)
    return found


async def _score(text: str, generation: Generation, num_top: int) -> dict[str, object]:
    (output,) = [output async for output in generation.outputs()]
    logprobs = await generate.in_turns(generate.sampled_logprob, output.logprobs) if num_top else None
    return {"text": text, "logprob": sum(output.scores), "num_tokens": len(output.scores), "logprobs": logprobs}


@router.post(
    "/compare",
    summary="Compare adapters",
    response_class=Response,
    responses={
        200: {
            "model": CompareAnswer,
            "description": "An answer for each expression; with `stream`, server-sent events",
            "content": {"text/event-stream": {"example": _EVENTS}},
        },
        **REFUSALS,
    },
)
@requires(GENERATE, queued=True)
async def compare_adapters(body: CompareBody, request: Request, services: ServicesDep) -> Response:
    """Answer one prompt under up to 16 adapter expressions in one batch, and score given continuations under
    each.
    """
    comparison = await compare(services, body)
    if body.stream:
        return EventStream(comparison.stream(), comparison.close)
    try:
        answer = await while_connected(request.scope, request.receive, comparison.collect())
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    finally:
        await comparison.close()
    return wire.answer(answer)
