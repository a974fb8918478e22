"""The single process and clusters on this machine, with the time that each kind of their processes takes."""

import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.measure import Run
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.systems.http_server import ServerProcess, free_port
from benchmarks.serving.systems.server_process import ServerConfig
from benchmarks.serving.systems.systems import Streams
from benchmarks.serving.systems.wires import Smolora

SINGLE = "single process"
CLIENT, API, REPLICA, RAY = "load client", "API", "replicas", "Ray"
KINDS = (CLIENT, API, REPLICA, RAY)
"""Of processes. The single process is its own API and engine, and counts as `REPLICA`."""
_TITLE = "ray::ServeReplica:smolora:engine"


@dataclass(frozen=True)
class Measured:
    """A run, and the seconds of processors that each kind of process took for it."""

    run: Run
    processor_seconds: Mapping[str, float]


class Served:
    """A server of either kind, and whoever belongs to it."""

    def __init__(self, name: str, config: ServerConfig, num_replicas: int = 0) -> None:
        """With no replicas the single process. It is ready once it is made."""
        self.name = name
        self._home = config.home
        self._is_single = not num_replicas
        words = config.command if self._is_single else up_command(config, num_replicas)
        self._server = ServerProcess(words, config.environment, config.log, "/ready")

    def measure(self, streams: Streams) -> Measured:
        """The streams at once, each one's requests one after the other."""
        before = self._processor_seconds()
        run = summarize(drive(self._server.url, Smolora(), streams))
        after = self._processor_seconds()
        return Measured(run, {kind: after[kind] - before.get(kind, 0.0) for kind in after})

    def stop(self) -> None:
        """Let it end by itself."""
        self._server.stop()

    def kill(self) -> None:
        """End it, however it is; of a cluster Ray's part as well, which has a session of its own."""
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((self._home / "cluster.json").read_text())
            os.kill(state["ray_pid"], signal.SIGTERM)
        self._server.__exit__(None, None, None)

    def _processor_seconds(self) -> dict[str, float]:
        found = dict.fromkeys(KINDS, 0.0)
        found[CLIENT] = _seconds(psutil.Process())
        root = psutil.Process(self._server.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found[self._kind_of(process)] += _seconds(process)
        return found

    def _kind_of(self, process: psutil.Process) -> str:
        command = process.cmdline()
        if self._is_single or command[:1] == [_TITLE]:
            return REPLICA
        return API if "server.cli" in command else RAY


def up_command(config: ServerConfig, num_replicas: int) -> list[str]:
    """`smolora cluster up` with the flags of the single process; Ray has room for these replicas alone."""
    flags = [flag for flag in config.command if flag.startswith("--")]
    more = [f"--replicas={num_replicas}", f"--cpus={num_replicas}", f"--ray-port={free_port()}"]
    return [str(Path(sys.executable).with_name("smolora")), "cluster", "up", *flags, *more]


def at(config: ServerConfig, home: Path) -> ServerConfig:
    """The same with another HOME."""
    return replace(config, home=home)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
