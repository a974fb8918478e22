"""Build the ASGI application from existing services. Importing this module has no side effects."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from inspect import signature
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware

from server import __version__
from server.api import accounts, adapters, compositions, datasets, health, imports, openapi, problems, tokens, web
from server.api import compare as compare
from server.api import decisions as decisions
from server.api import evaluate as evaluate
from server.api import generate as generate
from server.api import train as train
from server.api.accounts import keep_books, keep_now
from server.api.deps import Services
from server.api.edge import Edge
from server.api.housekeeping import clean_uploads, keep_house
from server.api.openai import completions, files, models
from server.api.openai import decisions as openai_decisions
from server.api.openai import fine_tuning as fine_tuning
from server.api.routes import Routes
from server.api.strict_route import closed_query

_DESCRIPTION = """One frozen SmolLM, any LoRA adapter per request: versioned, weighted and composed, never merged.

Errors are RFC 9457 problems, and OpenAI error objects under /v1; every response carries `X-Request-Id`."""


ROUTERS = (
    generate.router,
    compare.router,
    decisions.router,
    tokens.router,
    imports.router,  # before adapters.router, which would take "import" for a version
    adapters.router,
    adapters.aliases_router,
    compositions.router,
    train.router,
    evaluate.router,
    datasets.router,
    accounts.keys_router,
    accounts.projects_router,
    accounts.usage_router,
    health.router,
    web.router,
    models.router,
    completions.router,
    openai_decisions.router,
    files.router,
    fine_tuning.router,
)
ROUTES = Routes(ROUTERS, folders=("/docs", "/web"), files=("/openapi.json",))

_UNTRACED: dict[str, Any] = {"telemetry": dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False)}
"""Options that turn off FastAPI's own spans, because they include exception texts, which may quote a prompt."""


def create_app(services: Services) -> FastAPI:
    """Return the application. Its lifespan starts and stops the engine and background tasks."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.engine.start()
        services.guidance.start()

        def sweep() -> None:
            if services.bucket is not None:
                services.library.sweep()
            clean_uploads(services.storage)
            if days := services.settings.retain_audit:
                services.access.audit.prune(datetime.now(UTC) - timedelta(days=days))

        tasks = [
            asyncio.create_task(keep_house(services.retention, services.settings.retain_jobs, sweep=sweep)),
            asyncio.create_task(keep_books(services.access)),
            asyncio.create_task(services.access.ring.watch()),
            asyncio.create_task(services.metrics.loop.watch()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await services.engine.stop()
            await keep_now(services.access)
            await to_thread.run_sync(services.guidance.close)
            if services.tracer is not None:
                await to_thread.run_sync(services.tracer.close)

    root_path = services.settings.root_path
    app = openapi.App(
        title="smolora",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(closed_query)],
        **(_UNTRACED if "telemetry" in signature(FastAPI).parameters else {}),
        servers=[{"url": root_path}] if root_path else None,
        middleware=[Middleware(Edge, routes=ROUTES, services=services)],
    )
    app.state.services = services
    app.state.routes = ROUTES
    for router in ROUTERS:
        app.include_router(router)
    app.mount(web.ASSETS_PATH, web.assets)
    problems.install(app, ROUTES)
    return app
