"""POST /compare: one prompt under several adapter expressions, side by side."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import wire
from server.api.compare.comparison import compare
from server.api.compare.schemas import CompareAnswer, CompareBody
from server.api.deps import ServicesDep
from server.api.openapi import REFUSALS
from server.api.routes import GENERATE, requires
from server.api.streams import ClientGoneError, while_connected
from server.api.strict_route import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["generate"])


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
        return Response(status_code=499)  # nobody reads it; the log does
    finally:
        await comparison.close()
    return wire.answer(answer)
