"""POST /decide: typed questions about one input or many, answered with probabilities.

Each question about each input is one request to the engine, which scores all options together. At most
`_AT_ONCE` of these requests are in flight, so a large call leaves room in the queue. The prompts about one input
have a common prefix, which the prefix cache shares. `POST /v1/decisions` gives the same answers in OpenAI's form.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict
from starlette.responses import Response

from adapters.catalog.versions import Part
from adapters.errors import InvalidInput
from adapters.expression import MAX_LENGTH, Term
from adapters.library import Pinned
from server.api import wire
from server.api.deps import Services, ServicesDep, release
from server.api.generation import adapter_terms, ask_queue_for, charge_refused, encoded, start
from server.api.openapi import REFUSALS
from server.api.question_schemas import ITEMS_SCHEMA, QUESTIONS_SCHEMA
from server.api.routes import GENERATE, requires
from server.api.schemas import Body
from server.api.streams import ClientGoneError, while_connected
from server.api.strict_route import StrictRoute
from server.decisions.answers import answer, probabilities
from server.decisions.parts import input_text
from server.decisions.prompts import FORMAT, prompt_text
from server.decisions.questions import Question, parse_questions
from server.decisions.stored import StoredDecisions, shared_questions
from server.engine.request import SamplingParams
from server.errors import GenerationFailed, GenerationTimeout, QueueFull

MAX_INPUTS = 256
MAX_OPTIONS = 1 << 14
"""The most options of one call, over all questions and inputs."""
MAX_TOKENS = 1 << 20
"""The most tokens of all prompts of one call. The ids take up to 36 MB."""
HINT = "send fewer questions at a time"
"""Advice in errors about a body that is too large."""
_AT_ONCE = 32
_RETRY_SECONDS = 0.05
_SCORING = SamplingParams(max_tokens=0, temperature=0.0)

router = APIRouter(route_class=StrictRoute, tags=["generate"])

_INPUTS_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}}
_EXAMPLE: JsonDict = {
    "adapter": "base",
    "input": "My card was charged twice.",
    "questions": [
        {
            "type": "choice",
            "instructions": "Which team?",
            "choices": [{"value": "billing"}, {"value": "shipping", "description": "parcels and returns"}],
        }
    ],
}


class DecideBody(Body):
    """The body of POST /decide."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    adapter: str | None = Field(
        None, max_length=MAX_LENGTH, description='an adapter expression; null or "base": the frozen base'
    )
    input: Annotated[object, WithJsonSchema({"anyOf": [{"type": "string"}, _INPUTS_SCHEMA, ITEMS_SCHEMA]})] = (
        Field(description="a text, up to 256 texts, or the messages and function calls of one input")
    )
    questions: Annotated[object, WithJsonSchema({"anyOf": [QUESTIONS_SCHEMA, {"type": "null"}]})] = Field(
        None, description="null: the questions that the adapter's version stores"
    )


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class DecisionUsage(BaseModel):
    input_tokens: int = Field(description="of all prompts: one for each question about each input")
    input_tokens_details: InputDetails
    output_tokens: int = Field(description="scored tokens of options; shared ones count once a question")
    output_tokens_details: OutputDetails
    total_tokens: int


class DecideResult(BaseModel):
    index: int
    answers: list[dict[str, object]] = Field(
        description="in the questions' order: predicates have `probability`, choices `choice`, `confidence` and "
        "`probabilities`, scores `score`, `confidence` and `probabilities`"
    )


class DecideAnswer(BaseModel):
    """The answer of POST /decide."""

    results: list[DecideResult]
    calibrated: bool = Field(description="whether every question has a temperature fitted for this version")
    usage: DecisionUsage
    warnings: list[str]


@dataclass(frozen=True)
class Decided:
    """All answers of a call: those to each input, in the questions' order."""

    answers: list[list[dict[str, object]]]
    calibrated: bool
    usage: dict[str, object]
    warnings: list[str]
    parts: tuple[Part, ...]


@dataclass
class _Counts:
    """The tokens of a call's requests so far."""

    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0

    def usage(self) -> dict[str, object]:
        return {
            "input_tokens": self.num_input,
            "input_tokens_details": {
                "cached_tokens": self.num_cached,
                "cache_write_tokens": self.num_input - self.num_cached,
            },
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_input + self.num_output,
        }


@dataclass(frozen=True)
class _Asked:
    """One question about one input, as tokens."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


def inputs_of(value: object) -> list[str]:
    """Return the texts of the field `input` of POST /decide. Raise InvalidInput if it is invalid."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        if len(value) > MAX_INPUTS:
            raise InvalidInput.of("input", f"has {len(value)} texts, more than {MAX_INPUTS}: send fewer at a time")
        return [input_text(one, ("input", number)) for number, one in enumerate(value)]
    return [input_text(value)]


async def decide(
    services: Services,
    terms: Sequence[Term],
    inputs: Sequence[str],
    questions: Sequence[Question] | None,
    field: str = "adapter",
) -> Decided:
    """Answer the questions about each input. Errors about the adapters name `field`.

    If `questions` is None, ask those that the adapters' versions store. Everything that can be refused is refused
    before the first request reaches the engine. If the caller is cancelled, all requests are aborted.
    """
    pinned = await services.recent_pins.pin(services.library, terms, field) if terms else Pinned()
    try:
        parts = pinned.parts
        stored = await to_thread.run_sync(_stored, services, parts) if parts else []
        if questions is None:
            questions = shared_questions(stored)
        if questions is None:
            which = "the blend's parts don't store the same ones" if len(parts) > 1 else "none are stored with it"
            raise InvalidInput.of("questions", f"is required: {which}")
        num_options = len(inputs) * sum(len(question.options) for question in questions)
        if num_options > MAX_OPTIONS:
            message = (
                f"have {num_options:,} options over all inputs, more than {MAX_OPTIONS:,}: send fewer at a time"
            )
            raise InvalidInput.of("questions", message)
        ask_queue_for(services, min(len(inputs) * len(questions), _at_once(services)))
        asked = await _encode(services, inputs, questions)
        await services.access.rates.take(services.principal, "tokens", _num_tokens(asked))
        counts = _Counts()
        try:
            async with asyncio.timeout(services.settings.request_timeout):
                scores = await _score_all(
                    services, parts, [one for group in asked for one in group], counts, field
                )
        except TimeoutError:
            raise GenerationTimeout from None
    finally:
        await release(pinned)
    is_one = len(parts) == 1 and parts[0].weight == 1
    temperatures = stored[0].temperatures if is_one and stored[0] is not None else {}
    answers = []
    for number in range(len(inputs)):
        of_input = scores[number * len(questions) : (number + 1) * len(questions)]
        answers.append(
            [
                answer(question, probabilities(found, temperatures.get(question.digest, 1.0)))
                for question, found in zip(questions, of_input, strict=True)
            ]
        )
    calibrated = all(question.digest in temperatures for question in questions)
    return Decided(answers, calibrated, counts.usage(), [*pinned.warnings, *_warnings(parts, stored)], parts)


def _stored(services: Services, parts: Sequence[Part]) -> list[StoredDecisions | None]:
    catalog = services.library.catalog
    return [StoredDecisions.of(catalog.version(part.name, part.version).config) for part in parts]


def _warnings(parts: Sequence[Part], stored: Sequence[StoredDecisions | None]) -> list[str]:
    return [
        f"{part.name}@{part.version}: trained on prompts of format {one.format}, and this server's is {FORMAT}"
        for part, one in zip(parts, stored, strict=True)
        if one is not None and one.format != FORMAT
    ]


async def _encode(services: Services, inputs: Sequence[str], questions: Sequence[Question]) -> list[list[_Asked]]:
    """Return each input's questions as tokens. Raise InvalidInput if a prompt or all together are too long."""
    encoder, limit = services.submissions.encoder.decisions, services.max_num_tokens

    def encode() -> list[list[_Asked]]:
        options = [tuple(encoder.options(question)) for question in questions]
        asked: list[list[_Asked]] = []
        num_tokens = 0
        for place, text in enumerate(inputs):
            asked.append([])
            for question, of_question in zip(questions, options, strict=True):
                prompt = encoder.prompt(text, question)
                num_tokens += len(prompt)
                num = len(prompt) + max(map(len, of_question)) - 1
                if num > limit:
                    item = f"item {place}: " if len(inputs) > 1 else ""
                    message = f"{item}with a question it has {num:,} tokens, more than the model's {limit:,}"
                    raise _TooLong(num_tokens, message)
                if num_tokens > MAX_TOKENS:
                    message = f"all inputs and questions make over {MAX_TOKENS:,} tokens: send fewer at a time"
                    raise _TooLong(num_tokens, message)
                asked[-1].append(_Asked(prompt, of_question))
        return asked

    length = len(inputs) * sum(len(prompt_text("", question)) for question in questions)
    length += len(questions) * sum(map(len, inputs))
    try:
        return await encoded(services, encode, length, inputs, "input")
    except _TooLong as error:
        await charge_refused(services, error.num_tokens)
        raise InvalidInput.of("input", error.message) from None


class _TooLong(Exception):
    """Raised for too many tokens, after `num_tokens` of them were encoded."""

    def __init__(self, num_tokens: int, message: str) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.message = message


def _at_once(services: Services) -> int:
    most = services.engine.max_in_flight
    return _AT_ONCE if most is None else min(_AT_ONCE, most)


def _num_tokens(asked: Sequence[Sequence[_Asked]]) -> int:
    """Return how many tokens the engine computes or scores at most, if each input's common prefix counts once."""
    num_tokens = 0
    for group in asked:
        num_shared = _num_shared([one.prompt for one in group])
        num_tokens += num_shared + sum(len(one.prompt) - num_shared for one in group)
        num_tokens += sum(len(option) for one in group for option in one.options)
    return num_tokens


def _num_shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the common prefix of the prompts."""
    first, last = min(prompts), max(prompts)  # all others are between these, so they share their prefix
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(first))


async def _score_all(
    services: Services, parts: Sequence[Part], asked: Sequence[_Asked], counts: _Counts, field: str
) -> list[tuple[float, ...]]:
    """Return the scores of each question's options, and add the tokens to `counts`."""
    # all requests use the same versions, even if an alias moves meanwhile
    terms = [Term(part.name, part.version, weight=part.weight) for part in parts]
    scores: dict[int, tuple[float, ...]] = {}
    numbers = iter(range(len(asked)))

    async def work() -> None:
        for number in numbers:
            scores[number] = await _score(services, terms, asked[number], counts, field, is_first=number == 0)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(asked), _at_once(services))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [scores[number] for number in range(len(asked))]


async def _score(
    services: Services, terms: Sequence[Term], asked: _Asked, counts: _Counts, field: str, *, is_first: bool
) -> tuple[float, ...]:
    while True:
        try:
            generation = await start(
                *(services, terms, asked.prompt, _SCORING, 1, field),
                is_request=is_first,
                num_taken=0,
                continuations=asked.options,
            )
            break
        except QueueFull:
            if is_first:
                raise
            await asyncio.sleep(_RETRY_SECONDS)  # others took the place that this call's last request freed
    try:
        (output,) = [output async for output in generation.outputs()]
    finally:
        await generation.close()
    if len(output.scores) != len(asked.options):  # an older replica ignores continuations
        raise GenerationFailed("an engine can't score options: upgrade all replicas")
    counts.num_input += len(asked.prompt)
    counts.num_cached += output.num_cached_tokens
    counts.num_output += output.num_output_tokens
    return output.scores


@router.post(
    "/decide",
    summary="Answer questions with probabilities",
    response_class=Response,
    responses={200: {"model": DecideAnswer, "description": "The answers about each input"}, **REFUSALS},
)
@requires(GENERATE, queued=True, hint=HINT)
async def decide_inputs(body: DecideBody, request: Request, services: ServicesDep) -> Response:
    """Answer typed questions about an input, or about up to 256 inputs, with probabilities of their options."""
    terms = adapter_terms(body.adapter, None, services.base_name)
    questions = None if body.questions is None else parse_questions(body.questions)
    inputs = inputs_of(body.input)
    try:
        decided = await while_connected(request.scope, request.receive, decide(services, terms, inputs, questions))
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    results = [{"index": index, "answers": answers} for index, answers in enumerate(decided.answers)]
    return wire.answer(
        {
            "results": results,
            "calibrated": decided.calibrated,
            "usage": decided.usage,
            "warnings": decided.warnings,
        }
    )
