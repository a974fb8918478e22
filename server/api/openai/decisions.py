"""POST /v1/decisions, in OpenAI's form."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from adapters.errors import NotFound
from adapters.expression import MAX_LENGTH, Term, render
from server.api import wire
from server.api.decisions import HINT, decide
from server.api.deps import ServicesDep
from server.api.openai.batch import warning_headers
from server.api.openai.calls import terms_of
from server.api.openai.schemas import REFUSALS, answers_with
from server.api.problems import ModelNotFound
from server.api.question_schemas import INPUT_SCHEMA, QUESTIONS_SCHEMA
from server.api.routes import GENERATE, requires
from server.api.schemas import Body
from server.api.streams import ClientGoneError, while_connected
from server.api.strict_route import StrictRoute
from server.decisions.parts import input_text
from server.decisions.questions import parse_questions

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["openai"])

_USAGE = {
    "input_tokens": 90,
    "input_tokens_details": {"cached_tokens": 32, "cache_write_tokens": 58},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 94,
}
_EXAMPLE = {
    "model": "triage@1",
    "answers": [{"type": "predicate", "name": None, "probability": 0.97}],
    "usage": _USAGE,
}


class DecisionBody(Body):
    """The body of POST /v1/decisions."""

    model: str = Field(min_length=1, max_length=MAX_LENGTH, description="the base's name or an adapter expression")
    input: Annotated[object, WithJsonSchema(INPUT_SCHEMA)] = Field(
        description="a text, or messages and function calls"
    )
    questions: Annotated[object, WithJsonSchema(QUESTIONS_SCHEMA)]
    prompt_cache_key: str | None = Field(None, description="a label; changes nothing")
    prompt_cache_options: dict[str, object] | None = Field(None, description="changes nothing")
    safety_identifier: str | None = Field(None, description="a label; changes nothing")


@router.post(
    "/decisions",
    summary="Answer questions, in OpenAI's form",
    response_class=Response,
    responses={200: answers_with(_EXAMPLE), **REFUSALS},
)
@requires(GENERATE, queued=True, hint=HINT)
async def decisions(body: DecisionBody, request: Request, services: ServicesDep) -> Response:
    """Answer typed questions about an input. `model` is an adapter expression; the answer names its versions."""
    terms = terms_of(services, body.model)
    questions = parse_questions(body.questions)
    inputs = [input_text(body.input)]
    try:
        decided = await while_connected(
            request.scope, request.receive, decide(services, terms, inputs, questions, "model")
        )
    except NotFound as error:
        raise ModelNotFound(str(error)) from None
    except ClientGoneError:
        return Response(status_code=499)  # the client has left, so only the log shows this status
    used = render(Term(part.name, part.version, weight=part.weight) for part in decided.parts)
    model = used if decided.parts else services.base_name
    response = wire.answer({"model": model, "answers": decided.answers[0], "usage": decided.usage})
    for name, value in warning_headers(decided.warnings):
        response.headers.append(name, value)
    return response
