"""The web page at `/` and its files under `/web/`, and the API's documentation at /docs and /redoc.

The URL of each file contains a digest of all files, so browsers may cache the files forever. The page at `/`
contains the current digest, and is fetched each time. /docs and /redoc use scripts and styles from the package
fastapi-offline. Each page's content security policy allows only the server's own files; at /docs and /redoc, it
also allows inline styles, which both viewers need.
"""

import base64
import gzip
import hashlib
import posixpath
import re
from collections.abc import Mapping
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
_MAIN = "app.js"
_IMPORT = re.compile(rb"""^(?:import|export)\b[^;]*?\bfrom ?"(\.[^"]+)"|\bimport ?"(\.[^"]+)""", re.MULTILINE)
"""Static imports. Modules that are imported by a call, `import(...)`, are loaded when they are needed."""
_COMMENTS = re.compile(rb"^ *(?:/\*\*.*?\*/|//[^\n]*)", re.MULTILINE | re.DOTALL)
"""Comments on lines of their own in our modules. They aren't sent, which saves a sixth of the bytes."""

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
"""Headers of each page, in addition to its content security policy and the headers that `server.api.edge` adds."""
_HEADERS = {**SECURITY, "Content-Security-Policy": _POLICY, "Vary": "Accept-Encoding"}
_FOREVER = "public, max-age=31536000, immutable"

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
    """All files of the page. They are kept in memory, where they take a few hundred kilobytes."""

    digest: str
    index: _File
    files: dict[str, _File]


def _sent(path: Path) -> bytes:
    """Return a file's content to send. Of .js files, comments are removed; line numbers stay the same."""
    content = path.read_bytes()
    if path.suffix != ".js":
        return content
    return _COMMENTS.sub(lambda found: b"\n" * found.group().count(b"\n"), content)


def _imported_by(name: str, contents: Mapping[str, bytes]) -> set[str]:
    """Return the module `name` and all modules that it imports statically, which the page needs at first."""
    found, ahead = set[str](), [name]
    while ahead:
        module = ahead.pop()
        if module in found or module not in contents:
            continue
        found.add(module)
        for paths in _IMPORT.findall(contents[module]):
            path = b"".join(paths).decode()
            ahead.append(posixpath.normpath(posixpath.join(posixpath.dirname(module), path)))
    return found


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
    short = digest.hexdigest()[:16]
    modules = sorted(_imported_by(_MAIN, contents))
    preloads = "\n".join(f'<link rel="modulepreload" href="web/{short}/{name}">' for name in modules)
    index = template.replace("{{web}}", f"web/{short}").replace("{{preloads}}", preloads)
    files = {name: _File.of(content, _TYPES[Path(name).suffix]) for name, content in contents.items()}
    return _Page(short, _File.of(index.encode(), "text/html; charset=utf-8"), files)


@router.get("/")
@requires(OPEN)
async def index(request: Request) -> Response:
    """Return the page."""
    page = _page()
    return page.index.answer(request, "no-cache", page.digest)


@router.get("/web/{digest}/{name:path}")
@requires(OPEN)
async def file(digest: str, name: str, request: Request) -> Response:
    """Return one of the page's files.

    Answer 404 if there is no such file, or if `digest` isn't the current one: an open page then reloads.
    """
    page = _page()
    if digest != page.digest or name not in page.files:
        raise HTTPException(404, "the page has no such file: reload it, in case the server has a newer one")
    return page.files[name].answer(request, _FOREVER, digest)


ASSETS_PATH = "/docs/assets"
_OPENAPI = "/openapi.json"
_TITLE = "smolora"
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

assets = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")
"""The files to mount at ASSETS_PATH."""


@router.get("/docs")
@requires(OPEN)
async def docs(services: ServicesDep) -> HTMLResponse:
    """Return Swagger UI."""
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
    """Return ReDoc."""
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
    """Add security headers, with a policy that allows the page's inline scripts by their digests."""
    digests = (hashlib.sha256(script).digest() for script in _INLINE.findall(bytes(page.body)))
    hashes = "".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    page.headers.update({**SECURITY, "Content-Security-Policy": _PAGE_POLICY.format(hashes=hashes)})
    return page
