"""The API's own pages, /docs and /redoc, which need no key.

Their scripts and styles are those that the package fastapi-offline brings: nothing is fetched from elsewhere.
"""

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from server.api.deps import ServicesDep

ASSETS_PATH = "/docs/assets"
_OPENAPI = "/openapi.json"
_TITLE = "smolora"

router = APIRouter(include_in_schema=False)
assets = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")
"""To be mounted at ASSETS_PATH."""


@router.get("/docs")
async def docs(services: ServicesDep) -> HTMLResponse:
    """Swagger UI."""
    root = services.settings.root_path
    return get_swagger_ui_html(
        openapi_url=f"{root}{_OPENAPI}",
        title=_TITLE,
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
    )


@router.get("/redoc")
async def redoc(services: ServicesDep) -> HTMLResponse:
    """ReDoc."""
    root = services.settings.root_path
    return get_redoc_html(
        openapi_url=f"{root}{_OPENAPI}",
        title=_TITLE,
        redoc_js_url=f"{root}{ASSETS_PATH}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
        with_google_fonts=False,
    )
