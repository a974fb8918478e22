"""`/` and /web/: content, policy, origin and size."""

import gzip
import re
from pathlib import Path

import httpx
import pytest

import server

pytestmark = pytest.mark.anyio

OWN = re.compile(r"web/[0-9a-f]{16}/(?!vendor/).*")
MOST_OWN_BYTES = 58 << 10
"""Of the page's own code and style that the first view needs, as a browser fetches them."""


async def files_of(client: httpx.AsyncClient) -> list[str]:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    return sorted(set(re.findall(r'(?:src|href)="(web/[^"]+)"', page.text)))


async def test_the_page_and_its_files(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert "no-cache" in page.headers["cache-control"]
    again = await client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    types = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in await files_of(client):
        answer = await client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].partition(";")[0] == types[path[path.rindex(".") :]]
        assert "immutable" in answer.headers["cache-control"]


async def test_security_policy(client: httpx.AsyncClient) -> None:
    """Nothing inline, nothing from other origins, no frames."""
    page = await client.get("/")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page.text)
    assert "://" not in page.text
    assert page.headers["referrer-policy"] == "no-referrer"


async def test_only_the_modules_of_the_first_view_are_preloaded(client: httpx.AsyncClient) -> None:
    modules = {path.split("/", 2)[2] for path in await files_of(client) if path.endswith("js")}
    assert {"app.js", "lib/api.js", "vendor/hooks.mjs", "views/playground.js", "parts/basics.js"} <= modules
    assert not {"views/train.js", "views/engine.js", "parts/chart.js", "vendor/uplot.mjs"} & modules


async def test_it_is_small(client: httpx.AsyncClient) -> None:
    size = 0
    for path in filter(OWN.fullmatch, await files_of(client)):
        async with client.stream("GET", f"/{path}", headers={"Accept-Encoding": "gzip"}) as answer:
            content = b"".join([piece async for piece in answer.aiter_raw()])
            assert answer.headers["content-encoding"] == "gzip"
        size += len(content)
        plain = await client.get(f"/{path}", headers={"Accept-Encoding": "identity"})
        assert plain.content == gzip.decompress(content)
    assert 0 < size < MOST_OWN_BYTES, size


async def test_modules_come_without_notes(client: httpx.AsyncClient) -> None:
    """Lines keep their numbers, for reading errors."""
    digest = (await files_of(client))[0].split("/")[1]
    folder = Path(server.__file__).parent / "web"
    modules = [path.relative_to(folder) for path in folder.rglob("*.js")]
    assert len(modules) > 30
    for path in modules:
        sent = (await client.get(f"/web/{digest}/{path}")).text.splitlines()
        written = (folder / path).read_text("utf-8").splitlines()
        assert len(sent) == len(written)
        assert not any(line.lstrip().startswith(("/**", "* ", "*/", "//")) for line in sent), path
        assert all(
            line == other or other.lstrip()[:1] in ("/", "*") for line, other in zip(sent, written, strict=True)
        )


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    digest = (await files_of(client))[0].split("/")[1]
    for path in (
        "0123456789abcdef/app.js",
        f"{digest}/other.js",
        f"{digest}/../../config.py",
        f"{digest}/tsconfig.json",
    ):
        answer = await client.get(f"/web/{path}")
        assert answer.status_code == 404, path
        assert answer.headers["content-type"] == "application/problem+json"
    assert (await client.get("/web/0123456789abcdef/app.js")).json()["detail"] == (
        "the page has no such file: reload it, in case the server has a newer one"
    )


async def test_page_needs_no_key(client: httpx.AsyncClient) -> None:
    made = await client.post("/keys", json={"name": "first", "scopes": ["admin"]})
    assert made.status_code == 201
    assert (await client.get("/adapters")).status_code == 401
    for path in ["", *(await files_of(client))]:
        assert (await client.get(f"/{path}")).status_code == 200
