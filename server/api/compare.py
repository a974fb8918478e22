"""POST /compare: one prompt under several adapter expressions, side by side, with scores for given texts.

Every answer and every score is a separate request to the engine. All requests are submitted together, so that they
run in the same steps. Requests with the same expression share the prompt's keys and values. All answers use the
same random stream. A comparison is accepted as a whole or refused as a whole.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from adapters.errors import FieldError, InvalidInput
from adapters.expression import MAX_LENGTH, Term
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
from server.api.streams import ClientGoneError, while_connected
from server.api.strict_route import StrictRoute
from server.engine.request import SamplingParams

MAX_COMPARED = 16
MAX_SCORED = 16

router = APIRouter(route_class=StrictRoute, tags=["generate"])


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


class Comparison:
    """An accepted comparison. Await `collect` only once. `close` aborts the requests that still run."""

    def __init__(
        self, compared: Sequence[_Compared], texts: Sequence[str] | None, num_top: int, model: str
    ) -> None:
        self._compared = tuple(compared)
        self._texts = texts
        self._num_top = num_top
        self._model = model

    async def collect(self) -> dict[str, object]:
        """Return the whole answer. If the engine ends one of the requests with an error, raise that error."""
        tasks = [asyncio.ensure_future(self._result(place, one)) for place, one in enumerate(self._compared)]
        try:
            return {"results": await asyncio.gather(*tasks)}
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Abort the requests that still run, and release the adapters. Idempotent."""
        await close_all([generation for one in self._compared for generation in (one.answer, *one.scores)])

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
    num_sequences = len(terms) * (body.n + len(body.score or ()))
    if num_sequences > body.n:
        check_sequences(num_sequences, services.engine.max_in_flight, "adapters")
    ask_queue_for(services, num_sequences)
    prompt = await encode_prompt(services, body, body.max_tokens)
    continuations = await _continuations(services, len(prompt), body.score or ())
    check_logprobs(len(terms) * (body.n * body.max_tokens + sum(map(len, continuations))), body.logprobs)
    grammar = grammar_of(body.response_format, body.structured_outputs, body.regex)
    sampling = sampling_params(body, body.max_tokens, max(body.logprobs, 1))
    scoring = SamplingParams(max_tokens=0, temperature=0.0, logprobs=body.logprobs)
    num_tokens = len(terms) * (
        len(prompt) + body.n * body.max_tokens + sum(len(prompt) + len(one) for one in continuations)
    )
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
            compared.append(_Compared(expression, answer, tuple(scores)))
    except BaseException:
        await close_all(started)
        raise
    return Comparison(compared, body.score, body.logprobs, services.base_name)


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
    responses={200: {"model": CompareAnswer, "description": "An answer for each expression"}, **REFUSALS},
)
@requires(GENERATE, queued=True)
async def compare_adapters(body: CompareBody, request: Request, services: ServicesDep) -> Response:
    """Answer one prompt under up to 16 adapter expressions in one batch, and score given continuations under
    each.
    """
    comparison = await compare(services, body)
    try:
        answer = await while_connected(request.scope, request.receive, comparison.collect())
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    finally:
        await comparison.close()
    return wire.answer(answer)
