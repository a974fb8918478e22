"""The API's own pages, /docs and /redoc, which need no key.

Their scripts and styles are those that the package fastapi-offline brings: nothing is fetched from elsewhere, and
the policy that comes with each page allows nothing else. Styles may be inline, since both viewers write them.
"""

import base64
import hashlib
import re
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from server.api.deps import ServicesDep
from server.api.routes import OPEN, requires
from server.api.web import SECURITY

ASSETS_PATH = "/docs/assets"
_OPENAPI = "/openapi.json"
_TITLE = "smolora"
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_POLICY = (
    "default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)
assets = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")
"""To be mounted at ASSETS_PATH."""


@router.get("/docs")
@requires(OPEN)
async def docs(services: ServicesDep) -> HTMLResponse:
    """Swagger UI."""
    root = services.settings.root_path
    page = get_swagger_ui_html(
        openapi_url=f"{root}{_OPENAPI}",
        title=_TITLE,
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
    )
    return _secured(page)


@router.get("/redoc")
@requires(OPEN)
async def redoc(services: ServicesDep) -> HTMLResponse:
    """ReDoc."""
    root = services.settings.root_path
    page = get_redoc_html(
        openapi_url=f"{root}{_OPENAPI}",
        title=_TITLE,
        redoc_js_url=f"{root}{ASSETS_PATH}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
        with_google_fonts=False,
    )
    return _secured(page)


def _secured(page: HTMLResponse) -> HTMLResponse:
    """Add our own page's headers, and a policy that runs the page's inline scripts by their digests."""
    digests = (hashlib.sha256(script).digest() for script in _INLINE.findall(bytes(page.body)))
    hashes = "".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    page.headers.update({**SECURITY, "Content-Security-Policy": _POLICY.format(hashes=hashes)})
    return page
