"""A process whose engine hangs in native code, or that was stopped for a while: its clients' answers, and its end.
`tests.kits.hanging_server` is the process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.serve.process import DRAIN_SECONDS
from tests.end_to_end.server_process import free_port
from tests.kits.hanging_server import HANG, HANG_NOW, IN_THE_MIDDLE, LET_GO, LONG, SLOW

LEAST_SECONDS = 3.0
PATIENCE = 120.0
UNDRAINED_SECONDS = DRAIN_SECONDS - 5
"""Seconds within which a process ends without waiting: a process that drains takes longer."""
BODY = {"prompt": "a", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 300, "temperature": 0}
"""Greedy: one in seventy sampled answers ends by itself within about thirty tokens."""


class Process:
    """The server and its client."""

    def __init__(self, home: Path, model: Path, least_seconds: float = LEAST_SECONDS) -> None:
        self.home = home
        port = free_port()
        flags = {"home": home, "model": model, "port": port, "least-seconds": least_seconds}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.kits.hanging_server",
                *(f"--{name}={value}" for name, value in flags.items()),
            ],
            stderr=subprocess.DEVNULL,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            assert self.process.poll() is None, "it has ended"
            time.sleep(0.02)

    def is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def num_requests(self) -> int:
        """Return the number of running and waiting requests."""
        lines = self.client.get("/metrics").text.splitlines()
        names = ("smolora_requests_running ", "smolora_requests_waiting ")
        return sum(int(float(line.split()[1])) for line in lines if line.startswith(names))

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def server(converted_tiny: Path, tmp_path: Path) -> Iterator[Process]:
    server = Process(tmp_path, converted_tiny)
    try:
        server.wait_until(server.is_ready, "it was not ready in time")
        yield server
    finally:
        server.close()


def last_event(text: str) -> str:
    return text.removesuffix("\n\n").rpartition("\n\n")[2]


def test_an_engine_that_hangs_in_native_code(server: Process) -> None:
    """All running and waiting requests get an error and /ready fails; then workers yield, and the process ends."""
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("slow", "/generate", {**BODY, "seed": SLOW, "stream": True}),
        ("hanging", "/generate", {**BODY, "seed": HANG, "stream": True}),
        ("stream", "/generate", {**BODY, "stream": True}),
        ("chat stream", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("whole", "/generate", BODY),
        ("chat", "/v1/chat/completions", CHAT),
        ("waiting", "/generate", {**BODY, "stream": True}),
        ("waiting chat", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("waiting whole", "/compare", {**BODY, "adapters": ["base"]}),
    ]

    def has(num: int) -> bool:
        return server.num_requests() == num

    answers: dict[str, Future[httpx.Response]] = {}
    with ThreadPoolExecutor(len(asked)) as pool:
        for num, (name, path, body) in enumerate(asked, 1):
            answers[name] = pool.submit(server.client.post, path, json=body)
            server.wait_until(partial(has, num), "it did not begin")
        (server.home / HANG_NOW).touch()
        server.wait_until(lambda: server.client.get("/ready").status_code == 503, "it was never noticed")
        refused = server.client.get("/ready")
        assert refused.json()["detail"] == "the engine has stopped"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.get("/health").status_code == 200
        assert server.client.post("/generate", json=BODY).status_code == 503
        assert server.process.wait(timeout=UNDRAINED_SECONDS) == 1
    assert (server.home / LET_GO).exists()
    found = {name: answer.result() for name, answer in answers.items()}
    for name in ("slow", "hanging", "stream"):
        assert found[name].status_code == 200
        event, _, data = last_event(found[name].text).partition("\n")
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["status"] == 503
    assert found["chat stream"].status_code == 200
    error = json.loads(last_event(found["chat stream"].text).removeprefix("data: "))
    assert error["error"]["code"] == "service_unavailable"
    for name in ("whole", "waiting", "waiting whole"):
        assert found[name].status_code == 503, found[name].text
        assert int(found[name].headers["retry-after"]) >= 1
        assert found[name].headers["content-type"] == "application/problem+json"
    for name in ("chat", "waiting chat"):
        assert found[name].status_code == 503, found[name].text
        assert found[name].json()["error"]["code"] == "service_unavailable"


@pytest.mark.thorough
def test_stopped_process_resumes(server: Process) -> None:
    """It was stopped for longer than a step may take, in the middle of a step."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client.post, "/generate", json={**BODY, "max_tokens": 40, "seed": LONG})
        server.wait_until((server.home / IN_THE_MIDDLE).exists, "it did not begin")
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(LEAST_SECONDS + 1)
        os.kill(server.process.pid, signal.SIGCONT)
        assert answer.result().status_code == 200, answer.result().text
    assert server.client.get("/ready").status_code == 200
    assert not (server.home / LET_GO).exists()
    server.process.terminate()
    assert server.process.wait(timeout=UNDRAINED_SECONDS) == 0
