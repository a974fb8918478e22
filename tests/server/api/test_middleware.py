"""What happens to every request: ids, keys, limits of bodies, and problem documents in all cases."""

from collections.abc import AsyncIterator, Iterable

import httpx
import pytest
import sqlalchemy as sa

from server.engine.request import GenerationRequest, SequenceOutput
from tests.server.api.fakes import FakeEngine
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@pytest.fixture
async def locked(make_services: MakeServices) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client without a key, of a server with keys."""
    async with client_of(new_app(make_services(api_keys="first-0123456789,second-0123456789"))) as client:
        yield client


@pytest.mark.parametrize("key", ["first-0123456789", "second-0123456789"])
async def test_each_key_opens(locked: httpx.AsyncClient, key: str) -> None:
    response = await locked.get("/adapters", headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "first-0123456789", "Bearer", "Bearer ", "Bearer third"),
        *("Bearer first-012345678", "Basic first-0123456789", "Bearer f\xfcr"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/generate"), ("GET", "/adapters"), ("GET", "/metrics"), ("GET", "/nowhere")],
)
async def test_missing_key_is_refused_everywhere(
    locked: httpx.AsyncClient, header: str | None, method: str, path: str
) -> None:
    headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
    response = await locked.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/docs", "/redoc", "/openapi.json"])
async def test_probes_and_pages_stay_open(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


async def test_any_bearer_is_accepted_without_keys(client: httpx.AsyncClient) -> None:
    assert (await client.get("/adapters", headers={"Authorization": "Bearer x"})).status_code == 200


@pytest.mark.parametrize("given", ["abc-123", "trace:1.2_3", "x" * 128])
async def test_a_sane_request_id_is_kept(client: httpx.AsyncClient, given: str) -> None:
    assert (await client.get("/health", headers={"X-Request-Id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\xe9", "<script>"])
async def test_any_other_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    response = await client.get("/health", headers={b"X-Request-Id": given.encode("latin-1")})
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/generate", 405), ("POST", "/adapters", 405), ("GET", "/generate/", 404)],
)
async def test_paths_and_methods_that_are_not(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    assert response.headers["x-request-id"]
    if status == 405:
        assert response.headers["allow"]


async def chunks(total: int) -> AsyncIterator[bytes]:
    for _ in range(total // 65536):
        yield b" " * 65536


@pytest.mark.parametrize("announced", [True, False])
async def test_a_json_body_over_two_mebibytes(client: httpx.AsyncClient, announced: bool) -> None:
    content = b" " * (2 * MIB + 1) if announced else chunks(3 * MIB)
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_body_just_below_is_read(client: httpx.AsyncClient) -> None:
    content = b'{"prompt": "a"}' + b" " * (2 * MIB - 100)
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("length", ["268435457", "9" * 30])
async def test_an_upload_over_its_bound(client: httpx.AsyncClient, length: str) -> None:
    headers = {"Content-Length": length, "Content-Type": "multipart/form-data; boundary=x"}
    assert (await client.post("/adapters/a", content=b"", headers=headers)).status_code == 413


@pytest.mark.parametrize(
    ("name", "value", "status"), [("Content-Length", "9" * 30, 413), ("Content-Encoding", "gzip", 415)]
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_the_document_says_how_a_body_without_use_is_refused(
    client: httpx.AsyncClient, method: str, name: str, value: str, status: int
) -> None:
    assert (await client.request(method, "/adapters/a/1", headers={name: value})).status_code == status
    document = (await client.get("/openapi.json")).json()
    assert str(status) in document["paths"]["/adapters/{name}/{version}"][method.lower()]["responses"]


async def test_unforeseen_error_reveals_no_details(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: GenerationRequest) -> Iterable[SequenceOutput]:
        raise KeyError("/secret/path: the prompt")

    engine.script = script
    response = await client.post("/generate", json={"prompt": "the prompt"})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert "secret" not in response.text
    assert "KeyError" not in response.text
    assert "KeyError" in caplog.text
    assert "the prompt" not in caplog.text
    assert engine.open == set()


async def test_a_locked_database_is_not_the_servers_fault(client: httpx.AsyncClient, database: sa.Engine) -> None:
    """For example by an SQLite shell with an open transaction."""
    sa.event.listen(database, "checkout", lambda connection, *_: connection.execute("PRAGMA busy_timeout=0"))
    with database.begin():
        response = await client.post("/keys", json={"name": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["detail"] == "the database is locked by another process"
    assert (await client.post("/keys", json={"name": "a"})).status_code == 201
