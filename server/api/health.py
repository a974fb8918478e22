"""GET /health, /ready, /version and /metrics.

/health and /ready also answer HEAD, which load balancers often send.
"""

from functools import partial
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from server import __version__
from server.access.principal import SCOPES
from server.api import wire
from server.api.deps import ServicesDep
from server.api.openapi import KEYS, READY
from server.api.routes import ANY, METRICS, OPEN, requires
from server.api.schemas import Answer
from server.errors import EngineDead, NotReady
from server.metrics.metrics import CONTENT_TYPE

_rendering = CapacityLimiter(1)

router = APIRouter(tags=["health"])


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Can the process answer?")
@requires(OPEN, watcher="probe")
async def health() -> Response:
    """Return 200 while the process can answer. No key needed."""
    return wire.answer({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Can it serve?", responses=READY)
@requires(OPEN, watcher="probe")
async def ready(services: ServicesDep) -> Response:
    """Return 200 while the model is loaded, the engine makes progress and the server is not shutting down.

    The answer has the base's id, whether it takes `messages`, the scopes of a client without a key (`anonymous`),
    the kinds of code that compute (`backends`), and what doesn't work as it should (`fallbacks`).

    If the database doesn't answer, `degraded` says so. The answer is still 200 as long as the server can use the
    adapters and keys that it knows (STALE_NAMES, STALE_KEYS), and 503 after that.

    No key needed.
    """
    if services.engine.dead:
        raise EngineDead
    if not services.engine.ready:
        raise NotReady(retry_after=5)
    if not services.outage.is_survived:
        raise NotReady("the database doesn't answer", retry_after=5)
    anonymous, stats = services.access.ring.anonymous, services.engine.stats
    return wire.answer(
        {
            "status": "ready",
            "model": services.base_name,
            "chat_template": services.encoder.has_chat_template,
            "anonymous": [] if anonymous is None else [scope for scope in SCOPES if scope in anonymous.scopes],
            "backends": sorted(stats.backends),
            "fallbacks": sorted(stats.fallbacks),
            "degraded": ["the database doesn't answer"] if services.outage.is_on else [],
        }
    )


class VersionAnswer(Answer):
    version: str
    commit: str | None = Field(description="the Git commit of this code; null if it isn't known")


@router.get(
    "/version",
    summary="What runs here",
    response_class=Response,
    responses={200: {"model": VersionAnswer}, **KEYS},
)
@requires(ANY)
async def version(services: ServicesDep) -> Response:
    """Return the version, and the commit that it was built from."""
    return wire.answer(VersionAnswer(version=__version__, commit=services.commit))


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=KEYS)
@requires(METRICS, watcher="scraper")
async def metrics(
    services: ServicesDep,
    all_replicas: Annotated[
        bool, Query(description="also metrics of engine replicas that another API process reports")
    ] = False,
) -> Response:
    """Return counters, gauges and histograms in Prometheus' text format.

    In a cluster, an engine replica's metrics have the label `replica`, and one of the API processes reports them.
    Scrape all API processes, so that each replica counts once.
    """
    render = partial(services.metrics.render, all_replicas=all_replicas)
    text = await to_thread.run_sync(render, limiter=_rendering)
    return Response(text, media_type=CONTENT_TYPE)
