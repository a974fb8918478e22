"""Limits on connections, with fake transports and a fake clock."""

import asyncio
import json
import logging
import resource
import socket
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.config import Limits
from server.serve.connections import Connection, Connections, allow_files

pytestmark = pytest.mark.anyio
HEADERS = b"Host: a\r\n\r\n"
GET = b"GET / HTTP/1.1\r\n" + HEADERS
POST = b"POST / HTTP/1.1\r\nContent-Length: 9\r\n" + HEADERS


class Socket:
    def setsockopt(self, *args: int) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getpeername = getsockname
    family = socket.AF_INET


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"socket": Socket()})
        self._is_cut = False
        self.unsent = 0
        self.written = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return super().get_extra_info(name, default) if name == "socket" else None

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self._is_cut

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self._is_cut = True

    def abort(self) -> None:
        self._is_cut = True


class Bench:
    """A server's connections; its app answers when `go` is set."""

    def __init__(self, **limits: float) -> None:
        self.now = 100.0
        self.go = asyncio.Event()
        self.connections = Connections(Limits.model_validate(limits), lambda: self.now)
        self._config = uvicorn.Config(
            self._app, log_config=None, http=self.connections.protocol, interface="asgi3"
        )

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def connect(self) -> tuple[Connection, Transport]:
        connection = self.connections.protocol(self._config, ServerState(), {})
        assert isinstance(connection, Connection)
        transport = Transport()
        connection.connection_made(transport)
        return connection, transport

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.connections.look()

    async def answer(self) -> None:
        """Answer all requests."""
        self.go.set()
        for _ in range(5):
            await asyncio.sleep(0)
        self.go.clear()


async def test_slow_headers_time_out() -> None:
    bench = Bench(header_timeout=10)
    (_, cut_silent), (slow, cut_slow), (whole, cut_whole) = (bench.connect() for _ in range(3))
    whole.data_received(GET)
    for byte in GET[:9]:
        slow.data_received(bytes([byte]))
        bench.pass_time(1)
    assert not cut_silent.is_closing()
    assert not cut_slow.is_closing()
    slow.data_received(b"x")
    bench.pass_time(1)
    assert cut_silent.is_closing()
    assert cut_slow.is_closing()
    assert not cut_whole.is_closing()
    assert len(bench.connections) == 1


async def test_the_next_requests_headers_time_out() -> None:
    bench = Bench(header_timeout=10)
    connection, transport = bench.connect()
    connection.data_received(GET)
    await bench.answer()
    bench.pass_time(60)
    assert not transport.is_closing(), "idle between two requests, which is another bound's"
    connection.data_received(b"G")
    bench.pass_time(9)
    connection.data_received(GET[1:])
    bench.pass_time(9)
    assert not transport.is_closing()
    await bench.answer()
    connection.data_received(GET[:-1])
    bench.pass_time(10)
    assert transport.is_closing()


async def test_the_rest_of_an_answered_body_times_out() -> None:
    """Otherwise each byte of it would keep the connection open."""
    bench = Bench(header_timeout=10)
    connection, transport = bench.connect()
    connection.data_received(POST + b"a")
    await bench.answer()
    for _ in range(6):
        connection.data_received(b"a")
        bench.pass_time(2)
    assert transport.is_closing()


@pytest.mark.parametrize("first", [True, False], ids=["alone", "after a part of it"])
async def test_the_rest_of_an_answered_body_may_be_invalid_http(first: bool) -> None:
    """That is the client's error, so there is no answer and no traceback in the log."""
    bench = Bench()
    connection, transport = bench.connect()
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HEADERS
    connection.data_received(chunked + (b"3\r\nabc\r\n" if first else b""))
    await bench.answer()
    connection.data_received(b"zz\r\n")
    assert transport.is_closing()


@pytest.mark.parametrize("message", [b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n"])
async def test_invalid_http_is_answered_with_a_logged_id(message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The log's line has the client's address."""
    bench = Bench()
    connection, transport = bench.connect()
    connection.data_received(message)
    head, _, body = transport.written.decode().partition("\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:])
    assert head.startswith("HTTP/1.1 400 ")
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["status"] == 400
    assert f"not HTTP: request={headers['x-request-id']} client=127.0.0.1" in caplog.text
    assert transport.is_closing()


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_an_offer_of_another_protocol_logs_no_warning(
    caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    """Java's client offers HTTP/2 with each request."""
    bench = Bench()
    connection, transport = bench.connect()
    offer = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\n".encode()
    for _ in range(2):
        connection.data_received(b"GET / HTTP/1.1\r\n" + offer + HEADERS)
        assert not connection.is_idle
        await bench.answer()
        assert connection.is_idle
    assert not transport.is_closing()
    assert caplog.text == ""


async def test_a_slow_body_is_not_a_header_timeout() -> None:
    bench = Bench(header_timeout=10)
    connection, transport = bench.connect()
    connection.data_received(POST)
    bench.pass_time(1000)
    assert not transport.is_closing()


async def test_a_stalled_reader_times_out() -> None:
    bench = Bench(stall_timeout=30)
    connection, transport = bench.connect()
    connection.data_received(GET)
    transport.unsent = 1000
    bench.pass_time(1)
    bench.pass_time(29)
    assert not transport.is_closing()
    transport.unsent = 999
    bench.pass_time(29)
    bench.pass_time(29)
    assert not transport.is_closing()
    bench.pass_time(1)
    assert transport.is_closing()


async def test_a_client_that_still_reads_does_not_time_out() -> None:
    bench = Bench(header_timeout=10, stall_timeout=30)
    connection, transport = bench.connect()
    connection.data_received(POST)
    transport.unsent = 1000
    await bench.answer()
    for _ in range(10):
        transport.unsent -= 10
        bench.pass_time(9)
    assert not transport.is_closing()
    transport.unsent = 0
    bench.pass_time(9)
    assert not transport.is_closing()
    bench.pass_time(1)
    assert transport.is_closing()


async def test_the_longest_idle_connection_makes_room() -> None:
    bench = Bench(max_connections=4)
    (busy, cut_busy), (used, cut_used), (body, cut_body), (_, cut_new) = (bench.connect() for _ in range(4))
    busy.data_received(GET)
    body.data_received(POST)
    used.data_received(GET[:-1])
    assert not [cut for cut in (cut_busy, cut_used, cut_body, cut_new) if cut.is_closing()]
    for cut in (cut_new, cut_body, cut_used):
        other, _ = bench.connect()
        assert cut.is_closing()
        other.data_received(GET)
    assert not cut_busy.is_closing()
    assert len(bench.connections) == 4
    _, last = bench.connect()
    assert last.is_closing(), "none is idle"
    await bench.answer()
    assert not cut_busy.is_closing()
    bench.connect()
    assert cut_busy.is_closing()
    assert len(bench.connections) == 4


async def test_closed_connections_are_logged_once_per_look(caplog: pytest.LogCaptureFixture) -> None:
    """Without the log line operators couldn't know why clients are disconnected."""
    caplog.set_level(logging.INFO)
    bench = Bench(max_connections=2, header_timeout=10)
    for _ in range(2):
        bench.connect()[0].data_received(GET)
    for _ in range(3):
        bench.connect()
    bench.pass_time(1)
    bench.pass_time(1)
    await bench.answer()
    bench.connect()
    bench.pass_time(10)
    messages = [record.getMessage() for record in caplog.records if record.name == "smolora.api"]
    assert messages == [
        "closed 3 connections: SMOLORA_MAX_CONNECTIONS",
        "closed 1 connection: SMOLORA_HEADER_TIMEOUT",
        "closed 1 connection: SMOLORA_MAX_CONNECTIONS",
    ]


async def test_a_closed_connection_makes_room() -> None:
    bench = Bench(max_connections=1)
    first, _ = bench.connect()
    first.connection_lost(None)
    _, second = bench.connect()
    assert not second.is_closing()
    assert len(bench.connections) == 1


def test_the_file_limit_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits_set: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: limits_set.append(limits))
    for limits in ((1024, 4096), (4096, 4096), (resource.RLIM_INFINITY,) * 2):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert allow_files(Limits(max_connections=1024)).max_connections == 1024
    assert limits_set == [(1536, 4096)]
    assert caplog.text == ""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    assert allow_files(Limits(max_connections=1024)).max_connections == 512, "others need files, too"
    assert limits_set[1:] == [(1024, 1024)]
    assert "SMOLORA_MAX_CONNECTIONS" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    assert allow_files(Limits(max_connections=1024)).max_connections == 32
    assert allow_files(Limits(max_connections=20)).max_connections == 20


async def test_large_bodies_are_read_in_small_pieces() -> None:
    """Otherwise many concurrent uploads would delay other requests."""
    bench, sizes = Bench(), list[int]()

    class Counting(bench.connections.protocol):  # type: ignore[misc, name-defined]
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            super().data_received(data)

    bench.go.set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Counting(bench._config, ServerState(), {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        body = b"x" * 1_000_000
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n" % len(body) + HEADERS + body)
        assert b"200" in await reader.readline()
        while sum(sizes) < len(body):
            await asyncio.sleep(0.001)
        writer.close()
    assert max(sizes) <= 64 << 10
