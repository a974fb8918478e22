"""GET /health, /ready and /metrics: is the process there, can it serve, what has it done."""

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from starlette.responses import Response

from server.api import wire
from server.api.deps import ServicesDep
from server.api.openapi import KEYS, READY
from server.errors import EngineDead, NotReady
from server.metrics.metrics import CONTENT_TYPE

_rendering = CapacityLimiter(1)

router = APIRouter(tags=["health"])


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Can the process answer?")
async def health() -> Response:
    """200 while the process can serve. No key needed."""
    return wire.answer({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Can it serve?", responses=READY)
async def ready(services: ServicesDep) -> Response:
    """200 while the model is loaded, the engine makes progress and the server is not shutting down: the
    base's id, and whether it takes `messages`.

    No key needed.
    """
    if services.engine.dead:
        raise EngineDead
    if not services.engine.ready:
        raise NotReady(retry_after=5)
    has_template = services.encoder.has_chat_template
    return wire.answer({"status": "ready", "model": services.base_name, "chat_template": has_template})


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=KEYS)
async def metrics(services: ServicesDep) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    text = await to_thread.run_sync(services.metrics.render, limiter=_rendering)
    return Response(text, media_type=CONTENT_TYPE)
