"""/docs and /redoc: all of their content comes from this server."""

import re
from base64 import b64encode
from hashlib import sha256

import httpx
import pytest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_need_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    page = (await client.get(path)).text
    needed = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert needed
    for asset in needed:
        assert asset.startswith("/docs/assets/"), "a page without network would stay empty"
        answer = await client.get(asset)
        assert answer.status_code == 200
        assert len(answer.content) > 1000
    assert "/openapi.json" in page
    assert "https://" not in page.replace("https://fastapi.tiangolo.com", "")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_have_the_security_headers_of_the_page(client: httpx.AsyncClient, path: str) -> None:
    """They share the page's origin, whose storage has a key: only their own scripts run, and no other site may
    frame them."""
    page, ours = await client.get(path), await client.get("/")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy["script-src"] == " ".join(["'self'", *(f"'sha256-{found}'" for found in hashes)])
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    for name in ("referrer-policy", "x-content-type-options", "cross-origin-opener-policy"):
        assert page.headers[name] == ours.headers[name]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(
            ("GET", "/health", 200),
            ("GET", "/adapters", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/docs/assets/favicon.png", 200),
        ),
        *(
            ("GET", "/nowhere", 404),
            ("PUT", "/generate", 405),
            ("POST", "/generate", 422),
            ("POST", "/v1/completions", 400),
        ),
    ],
)
async def test_no_answer_can_be_framed_or_sniffed(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


async def test_where_compositions_are_listed(client: httpx.AsyncClient) -> None:
    answer = await client.get("/compositions")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "compositions are listed with the adapters: GET /adapters"
