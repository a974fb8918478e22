"""OpenVINO GenAI's continuous batching with the same weights in bf16, in its own process and environment.

Requests go through a pipe, without HTTP. Adapters apply to a whole batch: one adapter or one blend for all
streams. The base has its own pipeline without adapters. Settings with an uncertain effect are tried.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.allocation import described
from benchmarks.machine import has_feature, peak_rss
from benchmarks.measure import Run
from benchmarks.peers.venvs import MadePeer
from benchmarks.serving.systems.http_server import threads_environment
from benchmarks.serving.systems.systems import BASE, BLENDS, ONE, Facts, Load, Streams
from benchmarks.serving.systems.wires import Part

NAME = "OpenVINO GenAI"
PRECISION = "bf16" if has_feature("avx512f") else "f32"
"""Precision of its computation: with AVX2 alone it supports only fp32."""
VARIANTS = {
    f"cached keys and values in {cache}, {tokens} tokens a step": (cache, tokens)
    for cache in ("u8", PRECISION)
    for tokens in (256, 1024)
}
"""Settings with an uncertain effect; the first is its default."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class OpenVinoConfig:
    peer: MadePeer
    model: Path  # as written by `export`
    adapters: Mapping[str, Path]  # PEFT directories by name
    scaling: float  # alpha over rank of all adapters, which it doesn't read from their files
    threads: int
    slots: int
    log: Path
    variant: str = next(iter(VARIANTS))


class OpenVino:
    """A running OpenVINO process."""

    def __init__(self, config: OpenVinoConfig, trial: dict[str, tuple[float, ...]] | None = None) -> None:
        """Start it. `trial` has the speeds of the variants tried before. Raise RuntimeError with the end of its
        log if it fails."""
        self._log = config.log
        self._scaling = config.scaling
        with config.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(config.peer.python), "-m", "benchmarks.peers.openvino_child"],
                cwd=ROOT,
                env=os.environ | threads_environment(config.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        cache, tokens = VARIANTS[config.variant]
        started = self._call(
            {
                "model": str(config.model.resolve()),
                "adapters": {
                    name: str(place.resolve() / "adapter_model.safetensors")
                    for name, place in config.adapters.items()
                },
                "precision": PRECISION,
                "threads": config.threads,
                "sequences": config.slots,
                "cache": cache,
                "step_tokens": tokens,
            }
        )
        kept = described(bool(started["keeps_freed_memory"]))
        pipelines = "a pipeline for the base and one for adapters"
        settings = f"{pipelines}, {config.slots} sequences, inference in {PRECISION}, {config.variant}, {kept}"
        self.facts = Facts(NAME, config.peer.version, False, settings, trial or {})

    @property
    def peak_rss(self) -> int:
        return peak_rss(self._process.pid)

    def can(self, load: Load) -> bool:
        """Return whether all streams of the load use the same adapters."""
        return load.kind in (BASE, ONE) or load == Load(1, BLENDS)

    def run(self, streams: Streams) -> Run:
        """Run the streams. Raise ValueError if they use different adapters."""
        (parts,) = {request.parts for requests in streams for request in requests}
        found = self._call(
            {
                "adapters": self._scaled(parts),
                "streams": [
                    [(request.prompt, request.max_tokens) for request in requests] for requests in streams
                ],
            }
        )
        return Run(
            cast(int, found["num_tokens"]),
            cast(float, found["seconds"]),
            tuple(cast("list[float]", found["first_token"])),
            tuple(cast("list[float]", found["gaps"])),
            tuple(cast("list[str]", found["texts"])),
        )

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _scaled(self, parts: Sequence[Part]) -> list[tuple[str, float]]:
        return [(part.name, part.weight * self._scaling) for part in parts]

    def _call(self, command: Mapping[str, object]) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            raise RuntimeError(f"{NAME} failed:\n{self._log.read_text(errors='replace')[-2000:]}")
        found: dict[str, object] = json.loads(line)
        return found


def export(peer: MadePeer, base: Path, place: Path, log: Path) -> Path:
    """Export the Hugging Face model in `base` to OpenVINO with its weights' own dtype; takes about a minute."""
    command = [str(peer.program("optimum-cli")), "export", "openvino", "--task", "text-generation-with-past"]
    command += ["--model", str(base), str(place)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("ab") as file:
        done = subprocess.run(command, env=os.environ | offline, stdout=file, stderr=file, check=False)
    if done.returncode != 0:
        shutil.rmtree(place, ignore_errors=True)
        raise RuntimeError(f"exporting to OpenVINO failed:\n{log.read_text(errors='replace')[-2000:]}")
    return place
