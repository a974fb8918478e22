"""Hostile clients against a real server with short timeouts: other clients are still served."""

import io
import json
import random
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.end_to_end.training_client import code_rows

SECONDS = 1.0
"""Time limit of a normal request during an attack."""
TIMES = 20
"""Alternative limit: this multiple of the time without an attack, on a busy machine."""
MAX_CONNECTIONS = 300
TIMEOUT = 2.0


class Attacked(ServerProcess):
    undisturbed = 0.0
    """Return the seconds that a request takes without an attack."""


@pytest.fixture(scope="module")
def attacked(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    server = Attacked(
        tmp_path_factory.mktemp("home"),
        model=base_dir,
        max_connections=MAX_CONNECTIONS,
        header_timeout=TIMEOUT,
        body_timeout=TIMEOUT,
        stall_timeout=TIMEOUT,
    )
    try:
        server.generate("a", max_tokens=1)
        server.undisturbed = min(seconds_of_a_request(server) for _ in range(3))
        yield server
    finally:
        server.close()


@pytest.fixture
def server(attacked: Attacked) -> Iterator[Attacked]:
    works(attacked)
    yield attacked
    works(attacked)
    assert "Traceback" not in attacked.log()


def works(server: Attacked) -> None:
    """Check that a new client is answered in time: the best of three tries, as the machine is shared."""
    took: list[float] = []
    while len(took) < 3:
        took.append(seconds_of_a_request(server))
        if took[-1] < max(SECONDS, TIMES * server.undisturbed):
            return
    raise AssertionError((took, server.undisturbed))


def seconds_of_a_request(server: ServerProcess) -> float:
    start = time.perf_counter()
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        response = client.post("/generate", json={"prompt": "Hello", "max_tokens": 2})
    assert response.status_code == 200, response.text
    return time.perf_counter() - start


@contextmanager
def connections(server: Attacked, num: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        opened = []
        for _ in range(num):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE)))
            if first:
                opened[-1].sendall(first)
        yield opened


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed the connection, whatever it sent before."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def eventually(condition: Callable[[], bool], seconds: float = 15 * TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def num_closed(opened: list[socket.socket]) -> int:
    return sum(map(is_closed, opened))


def post(path: str, length: int) -> bytes:
    kind = "application/json" if path == "/generate" else "multipart/form-data; boundary=x"
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


@pytest.mark.thorough  # connections held for long are tested below
def test_1500_idle_sockets(server: Attacked) -> None:
    with connections(server, 1500) as opened:
        works(server)
        assert num_closed(opened) >= 1500 - MAX_CONNECTIONS
        eventually(lambda: num_closed(opened) == len(opened))
    assert "SMOLORA_HEADER_TIMEOUT" in server.log()


def test_headers_sent_byte_by_byte(server: Attacked) -> None:
    with connections(server, MAX_CONNECTIONS - 20, b"GET /health HTTP/1.1\r\nHo") as opened:
        start = time.monotonic()

        def send_more() -> bool:
            for connection in opened:
                with suppress(OSError):
                    connection.send(b"s")
            works(server)
            return num_closed(opened) == len(opened)

        eventually(send_more)
        assert time.monotonic() - start > TIMEOUT / 2


def test_stalled_bodies(server: Attacked) -> None:
    paths = ("/generate", "/datasets", "/adapters/a")
    with ExitStack() as stack:
        opened = []
        for path in paths:
            first = post(path, 1000) + (b" " if path == "/generate" else b"--x\r\n")
            opened += stack.enter_context(connections(server, MAX_CONNECTIONS // 2, first))
        works(server)
        eventually(lambda: num_closed(opened) == len(opened))


def test_stalled_reader(server: Attacked) -> None:
    """Its sequences are aborted long before their ends."""
    body = json.dumps(
        {"prompt": "a", "max_tokens": 4000, "n": 4, "stream": True, "ignore_eos": True, "logprobs": 20}
    ).encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(post("/generate", len(body)) + body)
        server.wait_for(requests_running=4)
        works(server)
        server.wait_for(requests_running=0)
        assert server.metrics()["smolora_generated_tokens_total"] < 16_000
    assert "SMOLORA_STALL_TIMEOUT" in server.log()


def test_followers_of_events(server: Attacked) -> None:
    job = server.client.post("/train", json={"name": "j", "data": code_rows(2)}).json()["id"]
    request = f"GET /train/{job}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode()
    with connections(server, 280, request) as opened:
        statuses = [connection.recv(12) for connection in opened]
        assert statuses.count(b"HTTP/1.1 200") == 192  # three quarters of 256: others may still follow
        assert statuses.count(b"HTTP/1.1 429") == 280 - 192
        works(server)
    server.client.post(f"/train/{job}/cancel")


def test_zip_bomb(server: Attacked) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("adapter_config.json", "{}")
        with archive.open("adapter_model.safetensors", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
    with ThreadPoolExecutor(4) as pool:
        files = {"archive": ("a.zip", bomb.getvalue())}
        uploads = [pool.submit(server.client.post, "/adapters/bomb", files=files) for _ in range(8)]
        works(server)
        assert {upload.result().status_code for upload in uploads} <= {413, 422, 429}


def lying_tensors() -> list[bytes]:
    """Return safetensors headers with false lengths, offsets, shapes and depths."""

    def tensors(header: bytes, claimed: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if claimed is None else claimed) + header + bytes(64)

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    far = {name: {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 60]}}
    over = {f"{name}{i}": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(20_000)}
    return [
        tensors(b"{}", claimed=1 << 62),
        tensors(json.dumps(far).encode()),
        tensors(json.dumps(over).encode()),
        tensors(b"[" * 500_000),
        tensors(b'{"a":' * 100_000),
        b"",
    ]


def requests_of(attack: str) -> list[dict[str, Any]]:
    """Return the requests in httpx's form."""
    if attack == "lying tensors":
        config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()
        bodies = [{"adapter_config": ("c", config), "adapter_model": ("m", data)} for data in lying_tensors()]
        return [{"method": "POST", "url": "/adapters/a", "files": files} for files in bodies]
    if attack == "regexes and grammars":
        regexes = ["(a*)*b", "(a|aa)+$", "((a{0,200}){0,200}){0,200}", "(?:x?){5000}x{5000}", "[" * 4000]
        schema = {"anyOf": [{"type": "array"}] * 900}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        asked: list[dict[str, object]] = [{"response_format": form}]
        asked += [{"regex": regex} for regex in regexes]
        json_bodies = [{"prompt": "a", "max_tokens": 2, **body} for body in asked]
        return [{"method": "POST", "url": "/generate", "json": body} for body in json_bodies]
    if attack == "multipart":
        many = b"".join(b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % i for i in range(5000))
        header = b"--x\r\nContent-Disposition: form-data; name=" + b'"' * 200_000 + b"\r\n\r\n"
        contents = [many + b"--x--\r\n", header, b"--x\r\n" * 100_000, b"-" * 1_000_000]
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        paths = ("/adapters/a", "/datasets", "/v1/files")
        return [
            {"method": "POST", "url": path, "headers": kind, "content": content}
            for content in contents
            for path in paths
        ]
    routes = [("GET", "/adapters"), ("POST", "/generate"), ("POST", "/adapters/a"), ("DELETE", "/adapters/a")]
    foreign = [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}]
    return [{"method": m, "url": url, "headers": headers} for m, url in routes for headers in foreign]


@pytest.mark.parametrize("attack", ["lying tensors", "regexes and grammars", "multipart", "foreign sites"])
def test_others_are_served_during_attacks(attack: str, server: Attacked) -> None:
    sent = requests_of(attack)

    def send(request: dict[str, Any]) -> int:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            return client.request(**request).status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = [pool.submit(send, request) for request in sent * 3]
        works(server)
        found = {status.result() for status in statuses}
    assert found <= ({403} if attack == "foreign sites" else {200, 400, 408, 413, 422, 429}), found


@pytest.mark.thorough
def test_random_disconnects_leave_nothing(server: Attacked) -> None:
    process = psutil.Process(server.process.pid)
    leave(server, 50, seed=0)  # allocate what is needed once
    server.wait_until_idle()
    before = process.num_fds(), process.num_threads()
    leave(server, 1000, seed=1)
    server.wait_until_idle()
    eventually(lambda: process.num_fds() <= before[0] + 8)
    assert process.num_threads() <= before[1] + 8


def leave(server: Attacked, times: int, seed: int) -> None:
    """Begin `count` requests, eight at a time, and disconnect within the body, before the answer, or within the
    answer."""

    def one(number: int) -> None:
        rng = random.Random(seed * 100_000 + number)
        body = {"prompt": "a " * rng.randint(1, 300), "max_tokens": 200, "ignore_eos": True}
        content = json.dumps(body | {"stream": rng.random() < 0.7, "n": rng.randint(1, 3)}).encode()
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            connection.sendall(post("/generate", len(content)) + content[: rng.choice([0, 20, len(content)])])
            connection.settimeout(rng.uniform(0, 0.3))
            with suppress(TimeoutError, OSError):
                connection.recv(rng.choice([1, 4096]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(times)))
