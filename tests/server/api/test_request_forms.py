"""HTTP forms of requests that are refused or accepted: codings, versions, targets, spellings of numbers."""

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from tests.server.conftest import client_of

pytestmark = pytest.mark.anyio


async def raw(
    app: FastAPI, path: str, headers: dict[str, str] | None = None, version: str = "1.1"
) -> tuple[int, dict[str, str]]:
    """Return status and headers of the answer to a GET with exactly `path` as its target."""
    pairs = {"host": "localhost", **(headers or {})}
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "http_version": version,
        "headers": [(name.encode(), value.encode()) for name, value in pairs.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "root_path": "",
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize("version", ["01", "+1", "1.0", "%201", "1%20", "1_0", "\u0661"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_version_has_one_spelling(client: httpx.AsyncClient, method: str, version: str) -> None:
    answer = await client.request(method, f"/adapters/one/{version}")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"loc": ["version"], "message": "must be a whole number"}]
    assert (await client.request(method, "/adapters/one/1")).status_code == 404


@pytest.mark.parametrize("day", ["0", "2026-11-30T00:00:00", "20261130", "2026-11-30Z", "-1"])
@pytest.mark.parametrize("name", ["from", "to"])
async def test_usage_takes_days_alone(client: httpx.AsyncClient, name: str, day: str) -> None:
    answer = await client.get("/usage", params={name: day})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"loc": [name], "message": "must be a day, such as 2027-01-31"}]
    assert (await client.get("/usage", params={name: "2026-11-30"})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "identity"}, 422),
    ],
)
async def test_an_encoded_body_is_refused(client: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    """It would be parsed as something else; `{}` itself lacks a prompt."""
    headers = {"Content-Type": "application/json"} | headers
    assert (await client.post("/generate", content=b"{}", headers=headers)).status_code == status


async def test_the_whole_url_may_be_the_target(app: FastAPI) -> None:
    """Proxies send it (RFC 9112, 3.2.2). Its host counts, whatever Host says."""
    assert (await raw(app, "http://localhost:8000/health"))[0] == 200
    assert (await raw(app, "http://localhost/adapters"))[0] == 200
    assert (await raw(app, "http://evil.example/adapters"))[0] == 403
    assert (await raw(app, "http://localhost/adapters", {"host": "evil.example"}))[0] == 200
    assert (await raw(app, "ftp://localhost/adapters"))[0] == 404


@pytest.mark.parametrize(("version", "status"), [("1.0", 200), ("1.1", 200), ("2.0", 505), ("0.9", 505)])
async def test_a_request_line_of_another_http_is_505(app: FastAPI, version: str, status: int) -> None:
    assert (await raw(app, "/health", version=version))[0] == status


async def test_a_request_with_two_lengths_ends_its_connection(app: FastAPI) -> None:
    """A proxy in front may use the other length, and take what follows for another request."""
    both = {"content-length": "5", "transfer-encoding": "chunked"}
    assert (await raw(app, "/health", both))[1]["connection"] == "close"
    for name in both:
        assert "connection" not in (await raw(app, "/health", {name: both[name]}))[1]


async def test_of_two_keys_none_counts(app: FastAPI) -> None:
    """A proxy in front of the server may have read the other one."""
    async with client_of(app) as client:
        made = await client.post("/keys", json={"name": "operator", "scopes": ["admin"]})
        right = ("Authorization", f"Bearer {made.json()['secret']}")
        wrong = ("Authorization", "Bearer wrong")
        found = [
            (await client.get("/adapters", headers=of)).status_code
            for of in ([right], [right, wrong], [wrong, right])
        ]
    assert found == [200, 401, 401]


async def test_metrics_are_for_keys_of_the_default_project(app: FastAPI) -> None:
    """Metrics name the adapters of all projects."""
    async with client_of(app) as client:
        answer = await client.post("/keys", json={"name": "a", "project": "acme", "scopes": ["metrics"]})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["loc"] == ["scopes"]
