"""POST /generate: text from the frozen base, under any adapters, at once or as it comes."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.generate import answers
from server.api.generate.generation import begin
from server.api.generate.schemas import GenerateAnswer, GenerateBody
from server.api.openapi import REFUSALS
from server.api.routes import GENERATE, requires
from server.api.streams import ClientGoneError, EventStream, while_connected
from server.api.strict_route import StrictRoute

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
            "description": "The answer; with `stream`, its pieces as server-sent events",
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
        return EventStream(answers.stream(generation, services.base_name), generation.close)
    try:
        answer = await while_connected(
            request.scope, request.receive, answers.collect(generation, services.base_name)
        )
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it; the log does
    finally:
        await generation.close()
    return wire.answer(answer)
