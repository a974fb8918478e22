"""`smolora serve` as a user runs it: a process with its own HOME, and a client connected to it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.metrics.metrics import MAX_AGE
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.kits.native import lend_native

PATIENCE = 120.0
"""Seconds for anything that should take a few: machines that run tests are busy."""


def command(words: Sequence[str] = ("serve",), **flags: object) -> list[str]:
    """Return the words of `smolora serve`, or of another command, with `flags` such as `--max-queue=4`, and no
    training workers."""
    given = {"workers": 0, **flags}
    smolora = str(Path(sys.executable).with_name("smolora"))
    return [smolora, *words, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def environment() -> dict[str, str]:
    """Return this process's environment without the server's settings. Idle threads sleep, as tests share the
    cores."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SMOLORA_")}
    return own | {"OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def default_threads() -> Iterator[None]:
    """Let processes started in the block have a thread per core, as by default; processes of tests otherwise have
    one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


class ServerProcess:
    """A running, ready server; `client` is connected to it."""

    def __init__(
        self,
        home: Path,
        key: str | None = None,
        words: Sequence[str] = ("serve",),
        **flags: object,
    ) -> None:
        """Start it. Raise RuntimeError, with the end of its log, if it doesn't become ready.

        `words`: as in `command`.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.home = home
        self._log = home / "log"
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=PATIENCE, trust_env=False)
        home.mkdir(parents=True, exist_ok=True)
        lend_native(home)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command(words, home=home, port=self.port, **flags),
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def generate(self, prompt: str, **fields: object) -> dict[str, Any]:
        """Return the answer of POST /generate, greedy unless `fields` say otherwise."""
        response = self.client.post("/generate", json={"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, prompt: str, **fields: object) -> str:
        """Return the text of its only choice."""
        (choice,) = self.generate(prompt, **fields)["choices"]
        return str(choice["text"])

    def texts(self, prompts: Sequence[str], **fields: object) -> list[str]:
        """Return the `text` of each prompt, requested four at a time."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda prompt: self.text(prompt, **fields), prompts))

    @contextmanager
    def stream(self, prompt: str, **fields: object) -> Iterator[Iterator[dict[str, Any]]]:
        """Yield a stream's events as they arrive; see `events`."""
        body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
        with self.client.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
            yield events(response.iter_lines())

    def upload(self, name: str, directory: Path) -> dict[str, Any]:
        """Publish the adapter that PEFT saved in `directory`; return the version as it is listed."""
        files = {
            "adapter_config": (CONFIG, (directory / CONFIG).read_bytes()),
            "adapter_model": (WEIGHTS, (directory / WEIGHTS).read_bytes()),
        }
        response = self.client.post(f"/adapters/{name}", files=files)
        assert response.status_code == 201, response.text
        version: dict[str, Any] = response.json()
        return version

    def metrics(self) -> Mapping[str, float]:
        """Return every sample of /metrics, by its name and labels. Samples of engine replicas are added up."""
        lines = self.client.get("/metrics?all_replicas=true").text.splitlines()
        found: dict[str, float] = {}
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#")):
            summed = name.partition('{replica="')[0]
            found[summed] = found.get(summed, 0.0) + float(value)
        return found

    def counts(self) -> Mapping[str, float]:
        """Return `metrics` once they include everything that was counted before this call."""
        time.sleep(MAX_AGE)
        return self.metrics()

    def wait_for(self, **gauges: int) -> None:
        """Wait until /metrics shows these numbers, as in `requests_running=4`. Raise AssertionError on timeout."""
        deadline = time.monotonic() + PATIENCE / 4
        wanted = {f"smolora_{name}": float(value) for name, value in gauges.items()}
        while not wanted.items() <= (found := self.metrics()).items():
            assert time.monotonic() < deadline, {name: found[name] for name in wanted}
            time.sleep(0.02)

    def wait_until_idle(self) -> None:
        """Wait until nothing runs, nothing waits, and no block is held."""
        self.wait_for(requests_running=0, requests_waiting=0, kv_blocks_used=0)

    def stores(self, digest: str) -> bool:
        """Return whether HOME has the adapter's bytes."""
        return (self.home / "adapters" / digest[:2] / digest).exists()

    def wait_until_removed(self, digest: str) -> None:
        """Wait until a thread has removed the adapter's bytes, once nothing holds them. Raise AssertionError on
        timeout."""
        deadline = time.monotonic() + PATIENCE / 4
        while self.stores(digest):
            assert time.monotonic() < deadline, f"{digest} is still stored"
            time.sleep(0.02)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process, as a power failure would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def exit_code(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    def close(self) -> None:
        """End the process in any state."""
        self.client.close()
        if self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at once:\n{self.log()[-2000:]}")
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the server was not ready in time:\n{self.log()[-2000:]}")


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the data of server-sent events. Raise AssertionError if one is an error, or the last isn't
    `[DONE]`."""
    for line in lines:
        assert not line.startswith("event:"), f"{line} {next(lines)}"
        if line == "data: [DONE]":
            assert [rest for rest in lines if rest] == []
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream broke off")


def free_port(number: int = 1) -> int:
    """Return the first of `count` consecutive free ports.

    The port is neither ephemeral (32768 and above), which the system may give to a connection, nor one that Ray
    gives to its workers (10002 to 19999).
    """
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with ExitStack() as probes, suppress(OSError):
            for port in range(first, first + number):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
