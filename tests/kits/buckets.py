"""An object store with S3's protocol in this process, and a proxy in front of it that fails on demand.

Tests that use it are marked `cluster`, and skipped if obstore or moto isn't installed.
"""

import http.client
import logging
import os
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

BUCKET = "smolora"
SECRET = "the-secret-of-the-tests"
EITHER = ["directory", pytest.param("bucket", marks=pytest.mark.cluster)]
"""Kinds of stores: parameters of fixtures."""

_IS_EMPTY = re.compile(rb"\r\ncontent-length: 0\r\n", re.IGNORECASE)
Failure = Literal["", "500", "busy", "stall", "cut", "half", "full"]
_BUSY = b"<Error><Code>XMinioServerNotInitialized</Code></Error>"
OpenBucket = Callable[..., "Bucket"]


class Proxy:
    """Forwards connections to the store, each with one request, and counts requests by method and path.

    `failure` is how the next requests fail: an answer of 500, one of 503 with a code of MinIO's, no answer, a
    closed connection, half an answer, or no space for writes; "" for none. `failures` is how many more fail; below
    0: all.
    """

    def __init__(self, host: str, port: int) -> None:
        self.failure: Failure = ""
        self.failures = -1
        self.asked: Counter[tuple[str, str]] = Counter()  # by method and path
        self._store = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def fail(self, failure: Failure, times: int = -1) -> None:
        with self._mutex:
            self.failure, self.failures = failure, times

    def count(self, method: str, ending: str) -> int:
        """Return the number of requests so far with that method and a path (without query) that ends so."""
        with self._mutex:
            return sum(n for (m, path), n in self.asked.items() if m == method and path.endswith(ending))

    def close(self) -> None:
        self._stopping.set()
        self._listener.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):  # the client may be gone, after the answer or a timeout
            head = _head(client)
            if not head:
                return
            failure = self._next(head)
            if failure == "500":
                client.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif failure == "busy":
                client.sendall(b"HTTP/1.1 503 Busy\r\nConnection: close\r\n")
                client.sendall(b"Content-Length: %d\r\n\r\n" % len(_BUSY) + _BUSY)
            elif failure == "full" and head.startswith(b"PUT ") and not _IS_EMPTY.search(head):
                client.sendall(b"HTTP/1.1 507 Full\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif failure == "stall":
                self._stopping.wait(60)
            elif failure != "cut":
                self._pass_on(client, head, half=failure == "half")

    def _next(self, head: bytes) -> Failure:
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        with self._mutex:
            self.asked[method, target.partition("?")[0]] += 1
            if not self.failure or self.failures == 0:
                return ""
            self.failures -= 1
            return self.failure

    def _pass_on(self, client: socket.socket, head: bytes, half: bool) -> None:
        with socket.create_connection(self._store) as store:
            # each request has a connection of its own, so that each can fail by itself
            store.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            threading.Thread(target=_copy, args=(client, store), daemon=True).start()
            answer = bytearray()
            while piece := store.recv(1 << 16):
                answer += piece
        name, _, rest = bytes(answer).partition(b"\r\n")
        whole = name + b"\r\nConnection: close\r\n" + rest
        client.sendall(whole[: len(whole) // 2] if half else whole)
        client.shutdown(socket.SHUT_RDWR)  # which closing it wouldn't, while a thread reads from it


def _head(client: socket.socket) -> bytes:
    """Read a request up to the end of its headers."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = client.recv(1 << 16)
        if not piece:
            return b""
        head += piece
    return head


def _copy(client: socket.socket, store: socket.socket) -> None:
    try:
        while piece := client.recv(1 << 16):
            store.sendall(piece)
    except OSError:  # one of the two has ended
        pass


@contextmanager
def running_store() -> Iterator[tuple[str, int]]:
    """Run a store with an empty bucket, and yield its address. Skip the test without obstore and moto."""
    pytest.importorskip("obstore", reason="needs the extra cluster")
    server = pytest.importorskip("moto.server", reason="needs the extra cluster-dev")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield host, port
    finally:
        running.stop()


def aws_variables(endpoint: str) -> dict[str, str]:
    """Return the AWS_ variables for the store at that address, with its keys."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


@pytest.fixture(scope="session")
def object_store() -> Iterator[tuple[str, int]]:
    """This process's `running_store`."""
    with running_store() as place:
        yield place


@pytest.fixture
def aws(object_store: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> str:
    """The store's address. The environment names the store and its keys during the test."""
    endpoint = "http://{}:{}".format(*object_store)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws_variables(endpoint).items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture
def bytes_url(aws: str) -> str:
    """The URL of a place in the store for this test alone, as in settings."""
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture
def bucket(bytes_url: str) -> "Bucket":
    """The place of `bytes_url`."""
    from adapters.storage.bucket import Bucket

    return Bucket.open(bytes_url, allow_http=True)


@pytest.fixture
def proxy(object_store: tuple[str, int]) -> Iterator[Proxy]:
    """A proxy between this test and the store."""
    proxy = Proxy(*object_store)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(bytes_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> "Bucket":
    """The place of `bytes_url` through the proxy, with a timeout of a second."""
    from adapters.storage.bucket import Bucket

    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return Bucket.open(bytes_url, allow_http=True, patience=1.0)


@pytest.fixture
def patient(proxied: "Bucket", bytes_url: str) -> "Bucket":
    """Like `proxied`, but it waits a minute: the store of a busy machine may need longer than a second."""
    from adapters.storage.bucket import Bucket

    return Bucket.open(bytes_url, allow_http=True, patience=60.0)
