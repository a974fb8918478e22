"""Several `smolora cluster up` on this machine, each with a HOME of its own, as on several machines."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import httpx
import psutil

from server.cluster.node import read_state
from tests.cluster.kit import CACHES, FLAGS, TITLE, wait_until
from tests.end_to_end.server_process import PATIENCE, command, environment
from tests.end_to_end.training_client import WORKER


def is_ready(url: str) -> bool:
    """Return whether the API at this URL is ready."""
    try:
        return httpx.get(f"{url}/ready", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class UpProcess:
    """One `smolora cluster up` with `num_apis` API processes. They are ready, unless it joined a cluster that
    isn't."""

    def __init__(
        self,
        home: Path,
        port: int,
        database_url: str,
        bytes_url: str,
        model: Path,
        variables: Mapping[str, str] | None = None,
        **flags: object,
    ) -> None:
        self.home = home
        home.mkdir(parents=True)
        self._environment = environment() | {
            "SMOLORA_DATABASE_URL": database_url,
            "SMOLORA_BYTES_URL": bytes_url,
            **(variables or {}),
        }
        self._flags = {"model": model, **FLAGS, **CACHES}
        self._log = home / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command(("cluster", "up"), home=home, port=port, **self._flags, **flags),
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def wait(self, num_apis: int) -> Self:
        """Wait until its API processes are ready."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log()
            return (self.home / "cluster.json").exists() and all(is_ready(url) for url in self.urls)

        wait_until(ready, "it isn't ready", 3 * PATIENCE)
        assert len(self.urls) == num_apis
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of its API processes."""
        return read_state(self.home).urls

    @property
    def address(self) -> str:
        """The address of its Ray cluster."""
        return read_state(self.home).address

    def replicas(self) -> list[int]:
        """Return the processes of the replicas on its Ray node."""
        found = []
        for process in psutil.Process(read_state(self.home).ray_pid).children(recursive=True):
            try:
                if process.cmdline()[0].startswith(TITLE):
                    found.append(process.pid)
            except (psutil.NoSuchProcess, IndexError):
                continue
        return found

    def head(self) -> psutil.Process:
        """Return the process of Ray's head, if it is on this machine."""
        below = psutil.Process(read_state(self.home).ray_pid).children(recursive=True)
        (found,) = (process for process in below if process.name() == "gcs_server")
        return found

    def children(self) -> set[int]:
        """Return its API processes and workers."""
        found = set()
        for process in psutil.Process(self.process.pid).children():
            if {"server.cli", WORKER} & set(process.cmdline()):
                found.add(process.pid)
        return found

    def call(self, word: str, **flags: object) -> str:
        """Run `smolora cluster WORD` with its HOME; return the output."""
        words = [part for part in command(("cluster", word), home=self.home, **flags) if part != "--workers=0"]
        if word == "deploy":
            given = {**self._flags, **flags}
            words = command(("cluster", word), home=self.home, **given)
        done = subprocess.run(
            words, env=self._environment, capture_output=True, text=True, timeout=3 * PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Stop it in any state."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.kill(self.process.pid, signal.SIGKILL)
                raise
