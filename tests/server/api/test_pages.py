"""/docs and /redoc: what they show comes from this server alone."""

import re

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


async def test_where_compositions_are_listed(client: httpx.AsyncClient) -> None:
    answer = await client.get("/compositions")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "compositions are listed with the adapters: GET /adapters"
