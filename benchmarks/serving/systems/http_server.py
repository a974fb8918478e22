"""A server process of any kind: start, readiness, memory use and end."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

READY_WITHIN = 180.0  # seconds
POLL = 0.01
RSS_EVERY = 0.2


class ServerProcess:
    """A running and ready server process; as a context manager it kills the process at the end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, ready: str) -> None:
        """Start the server; wait until the path `ready` returns 200. The port is appended to `command` as its last
        flag.

        Raise RuntimeError with the end of its log if it doesn't become ready.
        """
        self._name = Path(command[0]).name
        self._log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        started = time.perf_counter()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, "--port", str(port)], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            self._wait(f"{self.url}{ready}", started)
        except BaseException:
            self._kill()
            raise
        self.start_seconds = time.perf_counter() - started
        self.peak_rss = 0  # bytes, of the process and its children together
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def rss(self) -> int:
        """Resident bytes of the process and its children. Raise psutil.NoSuchProcess if one ended meanwhile."""
        process = psutil.Process(self._process.pid)
        return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))

    def stop(self) -> None:
        """Stop the process. Raise RuntimeError if it doesn't end or fails."""
        self._ended.set()
        self._watcher.join()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()
            raise RuntimeError(f"{self._name} did not end within a minute of SIGTERM") from None
        if code != 0:
            raise RuntimeError(f"{self._name} ended with {code}:\n{self._log_tail()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._kill()

    def _wait(self, url: str, started: float) -> None:
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.perf_counter() - started < READY_WITHIN:
                if self._process.poll() is not None:
                    raise RuntimeError(f"{self._name} ended at once:\n{self._log_tail()}")
                try:
                    if client.get(url).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL)
        raise RuntimeError(f"{self._name} was not ready within {READY_WITHIN:.0f} s:\n{self._log_tail()}")

    def _watch(self) -> None:
        while not self._ended.wait(RSS_EVERY):
            try:
                self.peak_rss = max(self.peak_rss, self.rss)
            except psutil.NoSuchProcess:
                continue  # a child ended meanwhile, or the server did, which the caller notices

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # it has its own session: this kills its children too
        self._process.wait()

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def threads_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
