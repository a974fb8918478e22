"""The client with servers that are slow, gone, restarted, or not smolora's."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapters.errors import Hint
from server.client.client import Client
from server.client.connection import ClientError


class Script:
    """A server that gives the next of `answers` to each request: (status, content type, body), or None to
    disconnect."""

    def __init__(self, *answers: "tuple[int, str, bytes] | None") -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, str, dict[str, str]]] = []


@contextmanager
def scripted(script: Script) -> Iterator[Client]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.rfile.read(int(headers.get("content-length", "0")))
            script.requests.append((self.command, self.path, headers))
            answer = script.answers.pop(0)
            if answer is not None:
                self.send_response(answer[0])
                self.send_header("Content-Type", answer[1])
                self.end_headers()
                self.wfile.write(answer[2])

        do_GET = do_POST = answer  # noqa: N815 as http.server has it

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}/", retries=(0.01,) * 3) as client:
            yield client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def document(value: object, status: int = 200) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(value).encode()


def stream(*events: Mapping[str, object], rest: bytes = b"") -> tuple[int, str, bytes]:
    lines = [f"id: {event['seq']}\ndata: {json.dumps(event)}\n\n" for event in events]
    return 200, "text/event-stream", b": hello\n\n" + "".join(lines).encode() + rest


def test_lost_answer_is_requested_again() -> None:
    script = Script(
        None, None, document({"detail": "draining", "errors": []}, 503), document({"id": "job-1"}, 202)
    )
    with scripted(script) as client:
        assert client.train({"name": "a"}) == {"id": "job-1"}
    keys = {headers["idempotency-key"] for _, _, headers in script.requests}
    assert (len(script.requests), len(keys)) == (4, 1)


def test_refusal_is_not_retried() -> None:
    problem = {"detail": "no", "errors": [{"loc": ["training", "epochs"], "message": "too many"}]}
    script = Script(None, document(problem, 422))
    with scripted(script) as client, pytest.raises(ClientError, match=r"^training\.epochs: too many$") as raised:
        client.train({"name": "a"})
    assert raised.value.status == 422


def test_errors_keep_the_hint_of_a_problem() -> None:
    hint = {"code": "list_jobs", "text": "GET /train lists them"}
    problem = {"detail": "there is no job x: GET /train lists them", "errors": [], "hint": hint}
    script = Script(document(problem, 404))
    with scripted(script) as client, pytest.raises(ClientError, match="GET /train lists them") as raised:
        client.job("x")
    assert raised.value.hint == Hint("list_jobs", "GET /train lists them")


def test_unreachable_server() -> None:
    with scripted(Script()) as client:
        url = client.url
    with Client(url) as client, pytest.raises(ClientError, match=f"can't reach {url}"):
        client.train({"name": "a"})


def test_broken_event_streams_are_resumed() -> None:
    events = [{"seq": seq, "type": "message"} for seq in range(1, 5)]
    script = Script(
        stream(events[0], rest=b'id: 2\ndata: {"seq"'),  # cut off within an event
        document({"status": "running"}),
        None,
        document({"detail": "not yet", "errors": []}, 503),
        stream(*events[1:3]),
        document({"status": "running"}),
        *[stream(), document({"status": "running"})] * 9,  # the server ends streams, but the job runs
        stream(events[3]),
        document({"status": "succeeded"}),
    )
    with scripted(script) as client:
        assert list(client.events("job-1")) == events
    asked = [headers["last-event-id"] for _, path, headers in script.requests if path.endswith("/events")]
    assert asked == ["0", "1", "1", "1", *["3"] * 10]


def test_events_give_up_if_the_server_stays_away() -> None:
    with scripted(Script(*[None] * 4)) as client, pytest.raises(ClientError):
        list(client.events("job-1"))


def test_events_of_an_unknown_job() -> None:
    script = Script(document({"detail": "there is no job x", "errors": []}, 404))
    with scripted(script) as client, pytest.raises(ClientError, match="there is no job x"):
        list(client.events("x/../y"))
    assert script.requests[0][1] == "/train/x%2F..%2Fy/events"


@pytest.mark.parametrize(
    "answer",
    [
        (200, "text/html", b"<html>"),
        (404, "text/html", b"<html>"),
        (500, "application/json", b"[]"),
        (500, "application/json", b'{"errors": [1]}'),
    ],
)
def test_answers_of_another_server_are_recognized(answer: tuple[int, str, bytes]) -> None:
    with scripted(Script(answer)) as client, pytest.raises(ClientError, match=r"doesn't speak|answered"):
        client.job("a")


def test_events_of_another_server_are_recognized() -> None:
    answer = (200, "text/event-stream", b"data: {\n\n")
    with scripted(Script(answer)) as client, pytest.raises(ClientError, match="doesn't speak"):
        list(client.stream({"prompt": "a"}))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://[::1"])
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(ClientError, match="not a server's address"):
        Client(url)


def test_key_is_sent() -> None:
    script = Script(document({"jobs": []}))
    with scripted(script) as client:
        url = client.url
        with Client(url, "secret") as keyed:
            assert keyed.jobs("queued", 3) == []
    method, path, headers = script.requests[0]
    assert (method, headers["authorization"]) == ("GET", "Bearer secret")
    assert path == "/train?limit=3&status=queued"


def test_answer_that_fails_midway() -> None:
    error = b'event: error\ndata: {"detail": "the engine has stopped", "status": 503}\n\n'
    script = Script((200, "text/event-stream", b'data: {"index":0,"text":"a"}\n\n' + error))
    with scripted(script) as client, pytest.raises(ClientError, match="the engine has stopped"):
        list(client.stream({"prompt": "a"}))
    with (
        scripted(Script((200, "text/event-stream", b""))) as client,
        pytest.raises(ClientError, match="broke off"),
    ):
        list(client.stream({"prompt": "a"}))


@pytest.mark.parametrize("value", [float("nan"), "\udcff"])
def test_values_that_json_lacks_are_refused(value: object) -> None:
    with scripted(Script()) as client, pytest.raises(ClientError, match="JSON"):
        client.generate({"prompt": value})
