"""The load client against a real server that drops connections."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest

from benchmarks.measure import Figures
from benchmarks.serving.load import MAX_RESENDS, RESEND_AFTER, drive, summarize
from benchmarks.serving.systems.wires import LlamaCpp, Request

WIRE = LlamaCpp([])
EVENTS = (
    {"content": "a", "stop": False},
    {"content": "b", "stop": False},
    {"content": "", "stop": True, "tokens_predicted": 2, "tokens_evaluated": 5, "timings": {"cache_n": 0}},
)


class _Dropping(ThreadingHTTPServer):
    """A server that answers with two tokens, but drops the connections of its first `drops` requests after `sent`
    events."""

    def __init__(self, drops: int, sent: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.drops = drops
        self.sent = sent
        self.prompts: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Dropping

    def do_POST(self) -> None:  # the name in the base class
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.prompts.append(body["prompt"])
            drops = len(self.server.prompts) <= self.server.drops
        if drops and not self.server.sent:
            return self._drop()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in EVENTS[: self.server.sent] if drops else EVENTS:
            data = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if drops:
            return self._drop()
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _drop(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def serving(drops: int, sent: int) -> Iterator[_Dropping]:
    with _Dropping(drops, sent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("sent", [0, 1], ids=["before the answer", "amid the answer"])
def test_dropped_requests_are_resent(sent: int) -> None:
    with serving(drops=1, sent=sent) as server:
        answers = drive(server.url, WIRE, [[Request("one", (), 2), Request("two", (), 2)]])
    assert server.prompts == ["one", "one", "two"]
    assert [answer.text for answer in answers] == ["ab", "ab"], "what had come before counts for nothing"
    assert [answer.num_resent for answer in answers] == [1, 0]
    assert answers[0].first_token >= RESEND_AFTER, "the time that was lost counts"
    run = summarize(answers)
    assert (run.num_tokens, run.num_resent, Figures.of(run).num_resent) == (4, 1, 1)


def test_server_that_drops_every_connection_is_an_error() -> None:
    with serving(drops=100, sent=0) as server, pytest.raises(aiohttp.ServerDisconnectedError):
        drive(server.url, WIRE, [[Request("one", (), 2)]])
    assert server.prompts == ["one"] * (1 + MAX_RESENDS)
