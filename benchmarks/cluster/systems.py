"""The single process and clusters on this machine, with the processor time of each kind of process."""

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
"""Kinds of processes. The single process is API and engine in one and counts as `REPLICA`."""
_TITLE = "ray::ServeReplica:smolora:engine"


@dataclass(frozen=True)
class Measured:
    """A run and the processor seconds that each kind of process used for it."""

    run: Run
    processor_seconds: Mapping[str, float]


class Served:
    """A running single process or cluster, with all its child processes."""

    def __init__(self, name: str, config: ServerConfig, num_replicas: int = 0) -> None:
        """Start it and wait until it is ready. Zero replicas mean the single process."""
        self.name = name
        self._home = config.home
        self._is_single = not num_replicas
        words = config.command if self._is_single else up_command(config, num_replicas)
        self._server = ServerProcess(words, config.environment, config.log, "/ready")

    def measure(self, streams: Streams) -> Measured:
        """Run all streams concurrently, with the requests of each stream in sequence."""
        before = self._processor_seconds()
        run = summarize(drive(self._server.url, Smolora(), streams))
        after = self._processor_seconds()
        return Measured(run, {kind: after[kind] - before.get(kind, 0.0) for kind in after})

    def stop(self) -> None:
        """Stop it and wait until it has ended."""
        self._server.stop()

    def kill(self) -> None:
        """Kill it in any state, including Ray's head process, which runs in a session of its own."""
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
    """Return the `smolora cluster up` command with the single process's flags; Ray gets one CPU per replica."""
    flags = [flag for flag in config.command if flag.startswith("--")]
    more = [f"--replicas={num_replicas}", f"--cpus={num_replicas}", f"--ray-port={free_port()}"]
    return [str(Path(sys.executable).with_name("smolora")), "cluster", "up", *flags, *more]


def at(config: ServerConfig, home: Path) -> ServerConfig:
    """Return the same configuration with another HOME."""
    return replace(config, home=home)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
