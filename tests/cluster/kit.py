"""A real Ray with engine replicas on a tiny base, and API processes."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from adapters.lora import BaseShape
from server.cluster import node
from server.config.environment import set_up_ray
from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment, free_port
from tests.server.api.adapters.peft_files import as_parts, peft_files

SIZES = {"max_position_embeddings": 4096}
"""Sizes of the tiny base: its answers may take many seconds."""
FLAGS: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "max_num_seqs": 16, "max_queue": 16}
CACHES: dict[str, Any] = {"adapter_cache_bytes": "4MiB", "kv_cache_bytes": "64MiB"}
TITLE = "ray::ServeReplica:smolora:engine"
"""Prefix of a replica's command line; during a call by Serve, the method's name follows."""


class Cluster:
    """Ray on this machine, with room for eight replicas regardless of cores."""

    def __init__(self, directory: Path, home: Path, model: Path) -> None:
        """Start Ray. Replicas read adapters from `home`; logs are in `directory`."""
        set_up_ray()
        self._ray, self.address = node.start_head(free_port(), directory / "ray.log", 8)
        self._home = home
        self._model = model

    def scale(self, num_replicas: int, **others: object) -> None:
        """Change the number of replicas; return once they are healthy."""
        flags = {"model": self._model, "home": self._home, **FLAGS, **CACHES, **others}
        words = ("cluster", "deploy")
        called = command(words, address=self.address, replicas=num_replicas, **flags)
        done = subprocess.run(
            called, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def api(self, home: Path, **flags: object) -> ServerProcess:
        """Start another API process; return it once it is ready."""
        given = {"model": self._model, **FLAGS, **flags}
        return ServerProcess(home, words=("cluster", "api"), address=self.address, **given)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the running replicas."""
        found = []
        for process in psutil.Process(self._ray.pid).children(recursive=True):
            try:
                if process.cmdline()[0].startswith(TITLE) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, IndexError):
                continue
        return found

    def close(self) -> None:
        """Stop everything."""
        for process in self.replicas():  # a test may have stopped one
            process.send_signal(signal.SIGCONT)
        self._ray.terminate()
        self._ray.wait(node.STOP_SECONDS)


def publish(server: ServerProcess, name: str, seed: int, shape: BaseShape) -> str:
    """Publish a random adapter, determined by the seed; return its digest."""
    response = server.client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed, shape=shape)))
    assert response.status_code == 201, response.text
    return str(response.json()["digest"])


def wait_until(condition: Callable[[], bool], what: str = "", patience: float = PATIENCE / 2) -> None:
    """Wait until the condition holds. Raise AssertionError on timeout."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def error_of(response: httpx.Response) -> tuple[int, object]:
    """Return the message of a refusal."""
    return response.status_code, response.json()["detail"]
