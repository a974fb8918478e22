"""The server under test: the real `smolora serve`, in a process and a HOME of its own."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

READY_WITHIN = 120.0  # seconds
POLL = 0.01
RSS_EVERY = 0.2
IMPORTS = (
    "import server.cli, server.api.app, server.api.logs, server.api.run, server.api.startup; print(flush=True)"
)
"""What `serve` imports before it does anything, and a sign that this is done."""


@dataclass(frozen=True)
class ServerConfig:
    home: Path
    base_dir: Path  # the folder that holds the converted base
    model: str
    dtype: str  # fp32, bf16 or fp16
    device: str
    threads: int
    log: Path
    adapter_cache_bytes: int | None = None
    native: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """This process' environment without any setting of the server's, and those of the run."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("SMOLORA_")}
        return own | threads_environment(self.threads)

    @property
    def command(self) -> list[str]:
        flags = {
            "home": self.home,
            "base-dir": self.base_dir,
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "adapter-cache-bytes": self.adapter_cache_bytes,
            "workers": 0,
        }
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        return [
            str(Path(sys.executable).with_name("smolora")),
            "serve",
            *given,
            *([] if self.native else ["--no-native"]),
        ]


class Server:
    """Running and ready once it is made; a context manager that ends it."""

    def __init__(self, config: ServerConfig) -> None:
        """RuntimeError, with the end of its log, where it does not become ready."""
        self._config = config
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        started = time.perf_counter()
        with config.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*config.command, f"--port={port}"],
                env=config.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait(started)
        except BaseException:
            self._kill()
            raise
        self.start_seconds = time.perf_counter() - started
        self.peak_rss = 0  # bytes, of the process and its children together
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def upload(self, name: str, directory: Path) -> None:
        """Publish the PEFT adapter in `directory`."""
        fields = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
        files = {field: (file, (directory / file).read_bytes()) for field, file in fields.items()}
        answer = httpx.post(f"{self.url}/adapters/{name}", files=files, timeout=READY_WITHIN, trust_env=False)
        if answer.status_code != 201:
            raise RuntimeError(f"uploading {name}: {answer.status_code}: {answer.text}")

    def metrics(self) -> Mapping[str, float]:
        """The metrics without labels, by name."""
        lines = httpx.get(f"{self.url}/metrics", trust_env=False).text.splitlines()
        pairs = (line.split(" ") for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def stop(self) -> None:
        """Let it end by itself; RuntimeError where it does not, or not well."""
        self._ended.set()
        self._watcher.join()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()
            raise RuntimeError("the server did not end within a minute of SIGTERM") from None
        if code != 0:
            raise RuntimeError(f"the server ended with {code}:\n{self._log_tail()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._kill()

    def _wait(self, started: float) -> None:
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.perf_counter() - started < READY_WITHIN:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the server ended at once:\n{self._log_tail()}")
                try:
                    if client.get(f"{self.url}/ready").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL)
        raise RuntimeError(f"the server was not ready within {READY_WITHIN:.0f} s:\n{self._log_tail()}")

    def _watch(self) -> None:
        process = psutil.Process(self._process.pid)
        while not self._ended.wait(RSS_EVERY):
            try:
                family = [process, *process.children(recursive=True)]
                self.peak_rss = max(self.peak_rss, sum(member.memory_info().rss for member in family))
            except psutil.NoSuchProcess:
                continue  # a child ended just now; or the server did, and whoever uses it notices

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: itself and its children
        self._process.wait()

    def _log_tail(self) -> str:
        return self._config.log.read_text(errors="replace")[-2000:]


def import_seconds(threads: int) -> float:
    """How long a new interpreter takes until it has imported what the server needs."""
    environment = os.environ | threads_environment(threads)
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-u", "-c", IMPORTS], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError("what the server needs can't be imported")
    return seconds


def threads_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
