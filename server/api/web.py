"""The page: `GET /`, and its files under `/web/`, each below the digest of all of them.

What lies below a digest never changes, so browsers keep it for good; `/` names the digest, and is asked for each
time. It takes nothing from elsewhere, and runs nothing but its own files: the policy that comes with it says so.

The API's own pages, /docs and /redoc, which need no key.

Their scripts and styles are those that the package fastapi-offline brings: nothing is fetched from elsewhere, and
the policy that comes with each page allows nothing else. Styles may be inline, since both viewers write them.
"""

import base64
import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

import server
from server.api.deps import ServicesDep
from server.api.routes import OPEN, requires

_FOLDER = Path(server.__file__).parent / "web"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
_LAZY = frozenset({"vendor/uplot.mjs"})
"""Modules that no view needs at once."""
_NOTES = re.compile(rb"^ */\*\*.*?\*/", re.MULTILINE | re.DOTALL)
"""Types and notes of our own modules, for whoever reads them there: a sixth of what would be sent."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
"""Of each page, with a policy of its own. `server.api.edge` adds those of every answer."""
_HEADERS = {**SECURITY, "Content-Security-Policy": _POLICY, "Vary": "Accept-Encoding"}
_FOR_GOOD = "public, max-age=31536000, immutable"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    content: bytes
    compressed: bytes
    media_type: str

    @classmethod
    def of(cls, content: bytes, media_type: str) -> "_File":
        return cls(content, gzip.compress(content, mtime=0), media_type)

    def answer(self, request: Request, cache_control: str, etag: str) -> Response:
        headers = {**_HEADERS, "Cache-Control": cache_control, "ETag": f'"{etag}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(self.compressed, media_type=self.media_type, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@dataclass(frozen=True)
class _Page:
    """Everything that is served, in memory: some hundred kilobytes."""

    digest: str
    index: _File
    files: dict[str, _File]


def _sent(path: Path) -> bytes:
    """What a browser gets of the file: our modules without notes, each line where it is."""
    content = path.read_bytes()
    if path.suffix != ".js":
        return content
    return _NOTES.sub(lambda found: b"\n" * found.group().count(b"\n"), content)


@cache
def _page() -> _Page:
    contents = {
        path.relative_to(_FOLDER).as_posix(): _sent(path)
        for path in sorted(_FOLDER.rglob("*"))
        if path.suffix in _TYPES
    }
    template = (_FOLDER / _INDEX).read_text(encoding="utf-8")
    digest = hashlib.sha256(template.encode())
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    told = digest.hexdigest()[:16]
    modules = (name for name in contents if name.endswith((".js", ".mjs")) and name not in _LAZY)
    preloads = "\n".join(f'<link rel="modulepreload" href="web/{told}/{name}">' for name in modules)
    index = template.replace("{{web}}", f"web/{told}").replace("{{preloads}}", preloads)
    files = {name: _File.of(content, _TYPES[Path(name).suffix]) for name, content in contents.items()}
    return _Page(told, _File.of(index.encode(), "text/html; charset=utf-8"), files)


@router.get("/")
@requires(OPEN)
async def index(request: Request) -> Response:
    """The page."""
    page = _page()
    return page.index.answer(request, "no-cache", page.digest)


@router.get("/web/{digest}/{name:path}")
@requires(OPEN)
async def file(digest: str, name: str, request: Request) -> Response:
    """One of its files. 404 where the digest is another version's: a page that is open is reloaded then."""
    page = _page()
    if digest != page.digest or name not in page.files:
        raise HTTPException(404, "the page has no such file: reload it, in case the server has a newer one")
    return page.files[name].answer(request, _FOR_GOOD, digest)


ASSETS_PATH = "/docs/assets"
_OPENAPI = "/openapi.json"
_TITLE = "smolora"
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

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
    page.headers.update({**SECURITY, "Content-Security-Policy": _PAGE_POLICY.format(hashes=hashes)})
    return page
