"""Accepted host names, pages that may call the server, and the path of a proxy."""

from collections.abc import Mapping

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.api.app import create_app
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio


async def status(client: httpx.AsyncClient, headers: Mapping[str, str], path: str = "/adapters") -> int:
    return (await client.get(path, headers=headers)).status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:8000", "10.1.2.3", "[::1]:8000", "[fe80::1]"],
)
async def test_loopback_names_and_addresses_are_accepted(host: str, client: httpx.AsyncClient) -> None:
    assert await status(client, {"Host": host}) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example/localhost",
        "localhost:port",
        "",
        "[::1",
        "1",
    ],
)
async def test_other_names_are_not(host: str, client: httpx.AsyncClient) -> None:
    """A page of evil.example may resolve its own name to 127.0.0.1, and then has the same origin."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    response = await client.get("/adapters", headers=headers)
    assert response.status_code == 403
    assert response.json()["detail"] == f"this server has no name {host}: SMOLORA_ALLOWED_HOSTS sets its names"
    assert "x-request-id" in response.headers
    for path in ("/health", "/ready"):
        assert await status(client, {"Host": host}, path) in (200, 503)
    error = (await client.get("/v1/models", headers=headers)).json()["error"]
    assert "SMOLORA_ALLOWED_HOSTS" in error["message"]


async def test_addresses_are_accepted_as_host(make_services: MakeServices) -> None:
    """Whatever host names are set: no page can resolve a name of its own to it."""
    async with client_of(new_app(make_services(allowed_hosts="lora.example.org"))) as client:
        for host in ("10.1.2.3:8000", "[fe80::1]:8000", "lora.example.org"):
            assert await status(client, {"Host": host}, "/metrics") == 200
        assert await status(client, {"Host": "evil.example"}, "/metrics") == 403
        assert await status(client, {"Host": "10.1.2.3:8000"}) == 403


@pytest.mark.parametrize(
    ("allowed", "host", "expected"),
    [
        ("lora.example.org", "lora.example.org:443", 200),
        ("lora.example.org", "LORA.example.org", 200),
        ("lora.example.org", "localhost", 403),
        ("lora.example.org", "127.0.0.1", 403),
        ("lora.example.org", "a.lora.example.org", 403),
        ("*.example.org, localhost", "a.b.example.org", 200),
        ("*.example.org, localhost", "localhost", 200),
        ("*.example.org", "example.org", 403),
        ("*.example.org", "example.org.evil", 403),
        ("::1", "[::1]:8000", 200),
        ("*", "whatever", 200),
    ],
)
async def test_names_that_are_set(allowed: str, host: str, expected: int, make_services: MakeServices) -> None:
    async with client_of(new_app(make_services(allowed_hosts=allowed))) as client:
        assert await status(client, {"Host": host}) == expected


async def test_the_host_that_it_listens_on_is_a_name(make_services: MakeServices) -> None:
    async with client_of(new_app(make_services(host="gpu-box", api_keys="operators-0123456789"))) as client:
        headers = {"Host": "gpu-box:8000", "Authorization": "Bearer operators-0123456789"}
        assert await status(client, headers) == 200
        assert await status(client, headers | {"Host": "other-box"}) == 403


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost", "http://localhost", 200),
        ("localhost", "https://localhost", 200),  # of a proxy that has the certificate
        ("localhost:443", "https://localhost", 200),
        ("localhost:8000", "HTTP://LOCALHOST:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "http://localhost", 403),
        ("localhost:8000", "http://127.0.0.1:8000", 403),
        ("localhost:8000", "https://evil.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
        ("localhost:8000", "file://", 403),
        ("localhost:8000", "chrome-extension://localhost:8000", 403),
        ("localhost:8000", "http://localhost:8000@evil.example", 403),
        ("localhost:8000", "http://evil.example\\@localhost:8000", 403),
    ],
)
async def test_only_its_own_pages_may_call(
    host: str, origin: str, expected: int, client: httpx.AsyncClient
) -> None:
    response = await client.get("/adapters", headers={"Host": host, "Origin": origin})
    assert response.status_code == expected
    if expected == 403:
        assert "SMOLORA_ALLOWED_ORIGINS" in response.json()["detail"]
        assert await status(client, {"Host": host, "Origin": origin}, "/health") == 403


async def test_a_foreign_page_uploads_nothing(client: httpx.AsyncClient) -> None:
    """A form upload needs no preflight, and used to get a 201."""
    files = as_parts(*peft_files())
    refused = await client.post("/adapters/theirs", files=files, headers={"Origin": "https://evil.example"})
    assert refused.status_code == 403
    assert (await client.get("/adapters")).json()["adapters"] == []
    assert (await client.post("/adapters/mine", files=files)).status_code == 201


async def test_no_route_is_forgotten(app: FastAPI, client: httpx.AsyncClient) -> None:
    paths = app.openapi()["paths"]
    assert len(paths) > 30
    for path in {*paths, "/openapi.json", "/docs/assets/swagger-ui.css", "/nowhere"}:
        path = path.replace("{", "").replace("}", "")
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
                if "Host" in headers and path in ("/health", "/ready"):
                    continue
                response = await client.request(method, path, headers=headers)
                assert response.status_code == 403, (method, path, headers)


async def test_the_body_is_not_read(app: FastAPI) -> None:
    async def body() -> Message:
        raise AssertionError("read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"origin", b"https://evil.example"), (b"content-length", b"1000000")]
    scope = {"type": "http", "method": "POST", "path": "/adapters/a", "headers": headers, "query_string": b""}
    await app(scope, body, send)
    assert sent[0]["status"] == 403


async def test_a_header_twice_is_refused(client: httpx.AsyncClient) -> None:
    for name, values in (("Host", ("localhost", "localhost")), ("Origin", ("http://localhost:8000",) * 2)):
        headers = [(name, value) for value in values]
        assert (await client.get("/adapters", headers=headers)).status_code == 403


async def test_sites_that_are_set_may_call(make_services: MakeServices) -> None:
    site = "https://app.example.org"
    services = make_services(allowed_origins=f"{site}/, http://OTHER:1", api_keys="operators-0123456789")
    async with client_of(new_app(services)) as client:
        asked = {
            "Origin": site,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = await client.options("/generate", headers=asked)  # a preflight never has a key
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == site
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        key = {"Authorization": "Bearer operators-0123456789"}
        answer = await client.get("/adapters", headers={"Origin": site} | key)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert await status(client, {"Origin": site}) == 401
        assert await status(client, {"Origin": "http://other:1"} | key) == 200
        assert await status(client, {"Origin": "http://localhost:8000"} | key) == 200
        assert await status(client, {"Origin": "http://other"} | key) == 403
        assert (await client.options("/generate", headers=asked | {"Origin": "http://other"})).status_code == 403


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    answer = await client.get("/adapters", headers={"Origin": "http://localhost:8000"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_behind_a_proxy(make_services: MakeServices) -> None:
    async with client_of(create_app(make_services(root_path="/lora"))) as client:
        for seed, prefix in enumerate(("", "/lora")):  # removed by the proxy, or not
            upload = await client.post(f"{prefix}/adapters/a", files=as_parts(*peft_files(seed)))
            assert upload.headers["location"].startswith("/lora/adapters/a/")
            assert (await client.get(upload.headers["location"])).json() == upload.json()
            page = (await client.get(f"{prefix}/docs")).text
            assert "/lora/openapi.json" in page
            assert (await client.get(f"{prefix}/docs/assets/swagger-ui.css")).status_code == 200
            assert (await client.get(f"{prefix}/openapi.json")).json()["servers"] == [{"url": "/lora"}]
            assert (await client.get(f"{prefix}/v1/nothing")).json()["error"]
        assert "<title>smolora" in (await client.get("/lora")).text
        assert (await client.get("/lorax/adapters")).status_code == 404
        body = {"name": "j", "data": [{"text": "a"}] * 2}
        job = (await client.post("/train", json=body)).headers["location"]
        await client.post(f"{job}/cancel")
        events = await client.get(f"{job}/events", params={"limit": 1})
        assert events.headers["link"].startswith(f"<{job}/events?")
        assert job.startswith("/lora/train/")
