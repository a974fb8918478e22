"""Any headers of any request, through the whole middleware: names, sites, keys and proxies' headers."""

import functools
from typing import TYPE_CHECKING, cast

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tests.stress.fuzzing.app import KEY, MAX_REQUESTS, World, check_answer
from tests.stress.fuzzing.choices import Choices
from tests.stress.fuzzing.target import Target

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

PROXIES = ["127.0.0.1", "10.0.0.0/8"]
PATHS = (
    *(
        "/generate",
        "/adapters",
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/keys",
        "/",
    ),
    *(
        "/openapi.json",
        "/docs",
        "/smolora",
        "/smolora/adapters",
        "/adapters/a/1/download",
        "/train/x/events",
        "/web/x",
    ),
    *("/nope", "/v1/nope", "//", "/adapters/../keys", "/projects/default", "/usage", "/datasets", "/%2e%2e", ""),
)
METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH", "TRACE", "G\xc9T", "")
NAMES = (
    *(b"host", b"origin", b"authorization", b"x-forwarded-for", b"x-forwarded-proto", b"openai-project"),
    *(b"content-length", b"content-type", b"x-request-id", b"expect", b"access-control-request-method"),
    *(
        b"access-control-request-headers",
        b"range",
        b"last-event-id",
        b"idempotency-key",
        b"accept-encoding",
        b"cookie",
    ),
    *(b"forwarded", b"x-forwarded-host", b"transfer-encoding", b"", b"content-encoding"),
)
SITES = (
    *(
        b"localhost",
        b"localhost:8000",
        b"127.0.0.1",
        b"[::1]:8000",
        b"lora.example.org",
        b"a.example.org",
        b"evil.test",
    ),
    *(
        b"localhost:99999",
        b"[::1",
        b"[v1.x]",
        b"user@localhost",
        b"a/b",
        b"",
        b" ",
        b"localhost:",
        b"LOCALHOST",
        b"\xe9",
    ),
    *(
        b"xn--nxasmq6b",
        b"localhost:\xb2",
        b"1.2.3",
        b"::1",
        b"a" * 5000,
        b"localhost\0",
        b"0x7f.1",
        b"[fe80::1%25eth0]",
    ),
)
VALUES = (
    *SITES,
    *(b"http://" + site for site in SITES[:10]),
    *(
        b"null",
        b"https://app.example.org",
        b"ftp://localhost",
        b"://",
        b"*",
        b"http://[",
        b"HTTPS://APP.EXAMPLE.ORG:443",
    ),
    *(
        b"Bearer " + KEY.encode(),
        b"Bearer",
        b"bearer  x ",
        b"Basic YTpi",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 9000,
    ),
    *(
        b"1.2.3.4, 127.0.0.1",
        b"10.0.0.1",
        b"1.2.3.4:80",
        b"[::1]:80",
        b",,,",
        b"unknown",
        b"https",
        b"wss",
        b"\xff",
        b"2",
    ),
    *(
        b"default",
        b"team",
        b"-1",
        b"1e3",
        b"9" * 30,
        b"100-continue",
        b"bytes=0-1",
        b"chunked",
        b"\xb2",
        b"application/json",
    ),
)


@functools.cache
def worlds() -> tuple[World, World]:
    """Return one world without keys, and one with every feature enabled."""
    far = World(
        api_keys=(KEY,),
        allowed_hosts=("lora.example.org", "*.example.org", "localhost"),
        allowed_origins=("https://app.example.org",),
        root_path="/smolora",
    )
    return World(), far


def proxied(app: ASGIApp) -> ASGIApp:
    """Wrap the application as uvicorn does if there are trusted proxies."""
    return cast(ASGIApp, ProxyHeadersMiddleware(cast("ASGI3Application", app), PROXIES))


def run(data: bytes) -> str:
    choices = Choices(data)
    is_far = choices.below(2) == 1
    world = worlds()[is_far]
    path, method = choices.pick(PATHS), choices.pick(METHODS)
    headers: list[tuple[bytes, bytes]] = []
    if not choices.one_in(3):
        headers += [(b"host", b"localhost"), *([(b"authorization", b"Bearer " + KEY.encode())] if is_far else [])]
    for _ in range(choices.below(8)):
        name = choices.some().lower() if choices.one_in(24) else choices.pick(NAMES)
        headers.append((name, choices.some() if choices.one_in(4) else choices.pick(VALUES)))
    answer = world.call(method, path, headers, b"{}" if choices.one_in(2) else b"", behind=proxied)
    is_ours = path not in ("", "//") and not path.startswith("/web") and method != "OPTIONS"  # CORS's to answer
    if answer.status and is_ours:
        check_answer(world.app, method, path.removeprefix("/smolora"), answer)
    return f"{answer.status}"


def seeds() -> list[bytes]:
    found = [
        bytes([world, path, method, 0, 0, 0])
        for world in (0, 1)
        for path in range(len(PATHS))
        for method in (0, 1)
    ]
    pairs = [(name, value) for name in range(7) for value in range(0, len(VALUES), 5)]
    return [*found, *(bytes([1, 1, 0, 2, 1, 0, name, 0, value]) for name, value in pairs)]


TARGET = Target(run, seeds, num_before=MAX_REQUESTS, max_len=1024, words=SITES[:8])
