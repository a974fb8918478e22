"""A full queue refuses a request before its body is read, and the client sees the answer."""

import httpx
import pytest

from server.errors import QueueFull
from tests.server.api.fakes import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/generate", "/compare", "/v1/completions", "/v1/chat/completions"])
async def test_the_body_is_not_looked_at(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    engine.refusal = QueueFull(retry_after=3)
    response = await client.post(path, content=b"not JSON")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert (await client.get("/adapters")).status_code == 200
    engine.refusal = None
    assert (await client.post(path, content=b"not JSON")).status_code in (400, 422)
