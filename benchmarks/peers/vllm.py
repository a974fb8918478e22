"""vLLM on a GPU, if it is installed next to smolora. Not yet run: there was no GPU.

It has adapters by the name of the model, without blends; its prefix cache is on, as ours is.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Run
from benchmarks.serving.adapter_files import RANK
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.options import VLLM
from benchmarks.serving.systems.http_server import ServerProcess
from benchmarks.serving.systems.systems import BLENDS, Facts, Load, Streams
from benchmarks.serving.systems.wires import OpenAiCompletions

_BASE = "base"
_MEMORY_SHARE = 0.3
"""Share of the GPU's memory; our server runs on the same GPU."""


def is_installed() -> bool:
    return find_spec("vllm") is not None


@dataclass(frozen=True)
class VllmConfig:
    base: Path  # a Hugging Face directory
    adapters: Mapping[str, Path]  # PEFT directories by name
    max_num_seqs: int
    max_model_len: int
    log: Path

    @property
    def command(self) -> list[str]:
        flags = {
            "model": self.base,
            "served-model-name": _BASE,
            "dtype": "bfloat16",
            "max-num-seqs": self.max_num_seqs,
            "max-model-len": self.max_model_len,
            "gpu-memory-utilization": _MEMORY_SHARE,
            "max-loras": max(1, len(self.adapters)),
            "max-lora-rank": RANK,
        }
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        modules = [f"{name}={directory}" for name, directory in self.adapters.items()]
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", *given),
            *("--enable-lora", "--lora-modules", *modules),
        ]


class Vllm:
    """A running vLLM server."""

    def __init__(self, config: VllmConfig) -> None:
        self._server = ServerProcess(config.command, os.environ, config.log, "/health")
        settings = f"{config.max_num_seqs} sequences, {_MEMORY_SHARE:.0%} of the GPU's memory"
        self.facts = Facts(VLLM, version("vllm"), True, settings, {})

    @property
    def peak_rss(self) -> int:
        return self._server.peak_rss

    def can(self, load: Load) -> bool:
        return load.kind != BLENDS

    def run(self, streams: Streams) -> Run:
        return summarize(drive(self._server.url, OpenAiCompletions(_BASE), streams))

    def stop(self) -> None:
        self._server.stop()
