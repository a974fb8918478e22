"""llama.cpp's server over HTTP, with the same weights in bf16 or quantized from them.

It gets every setting that our server has: one slot per stream, continuous batching, and adapters per request, each
with a scale. Flags with an uncertain effect are tried both ways. llama.cpp runs requests with different adapters
one after the other.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.allocation import KEPT, TUNABLES
from benchmarks.measure import Run
from benchmarks.peers.gguf_files import write_adapter
from benchmarks.peers.venvs import LLAMA_CPP, MadePeer
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.systems.http_server import ServerProcess, threads_environment
from benchmarks.serving.systems.systems import BASE, Facts, Load, Streams
from benchmarks.serving.systems.wires import LlamaCpp

VARIANTS = {
    f"flash attention {attention}, {cache}": ("--flash-attn", attention, *flags)
    for attention in ("on", "off")
    for cache, flags in (
        ("a cache per slot", ("--no-kv-unified",)),
        ("one cache for all slots", ("--kv-unified",)),
    )
}
"""Flags with an uncertain effect, all of which are tried."""


@dataclass(frozen=True)
class LlamaCppConfig:
    peer: MadePeer
    model: Path  # a GGUF file
    adapters: Mapping[str, Path]  # GGUF files by name; empty: only the base is served
    threads: int
    slots: int
    tokens_per_slot: int
    log: Path
    variant: str = next(iter(VARIANTS))
    weights: str = "bf16"

    @property
    def command(self) -> list[str]:
        flags = {
            "model": self.model,
            "threads": self.threads,
            "threads-batch": self.threads,
            "parallel": self.slots,
            "ctx-size": self.slots * self.tokens_per_slot,
            "cache-ram": 0,  # no host copies of slots: no prompt is repeated
        }
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        given += VARIANTS[self.variant]
        if self.adapters:
            files = ",".join(map(str, self.adapters.values()))
            given += ["--lora", files, "--lora-init-without-apply"]
        return [str(self.peer.program("llama-server")), *given]


class LlamaCppServer:
    """A running llama.cpp server."""

    def __init__(self, config: LlamaCppConfig, trial: dict[str, tuple[float, ...]] | None = None) -> None:
        """Start it. `trial` has the speeds of the variants tried before."""
        environment = os.environ | threads_environment(config.threads) | {"GLIBC_TUNABLES": TUNABLES}
        self._server = ServerProcess(config.command, environment, config.log, "/health")
        self._wire = LlamaCpp(list(config.adapters))
        name = LLAMA_CPP if config.weights == "bf16" else f"{LLAMA_CPP}, {config.weights}"
        settings = f"{config.slots} slots, {config.variant}, host prompt cache off, {KEPT}"
        self.facts = Facts(name, config.peer.version, True, settings, trial or {}, not config.adapters)

    @property
    def peak_rss(self) -> int:
        return self._server.peak_rss

    def can(self, load: Load) -> bool:
        return load.kind == BASE or not self.facts.base_only

    def run(self, streams: Streams) -> Run:
        return summarize(drive(self._server.url, self._wire, streams))

    def stop(self) -> None:
        self._server.stop()


def quantize(peer: MadePeer, model: Path, weights: str) -> Path:
    """Quantize the model to a type such as Q8_0; return the new file in the same folder."""
    file = model.with_name(f"{model.stem}-{weights}.gguf")
    command = [str(peer.program("llama-quantize")), "--allow-requantize", str(model), str(file), weights]
    subprocess.run(command, check=True, capture_output=True)
    return file


def adapter_files(base: Path, directories: Mapping[str, Path], place: Path) -> dict[str, Path]:
    """Convert the PEFT adapters of `base` to GGUF files in the new folder `place`, by name."""
    place.mkdir()
    files = {name: place / f"{name}.gguf" for name in directories}
    for name, directory in directories.items():
        write_adapter(base, directory, files[name])
    return files
