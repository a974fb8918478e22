"""The server under test: the real `smolora serve`, with its own process and HOME."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from adapters.lora import BaseShape
from benchmarks.serving.systems.http_server import READY_WITHIN, ServerProcess, threads_environment
from server.model.native.model import ROW_FORMAT
from server.model.rank_rows import RowFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPORTS = (
    "import server.cli.main, server.api.app, server.telemetry.logs, server.serve.process, server.serve.startup; "
    "print(flush=True)"
)
"""The imports of `serve` before it does anything, followed by a signal that they are done."""


@dataclass(frozen=True)
class ServerConfig:
    home: Path
    base_dir: Path  # the folder of the converted base
    model: str
    dtype: str  # a key of DTYPES
    device: str
    threads: int
    log: Path
    adapter_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    native: bool = True
    instructions: str | None = None  # None: the best that this processor has
    workers: int = 0  # that train
    train_share: float | None = None

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the server's settings replaced by those of the run."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("SMOLORA_")}
        restricted = {} if self.instructions is None else {"NATIVE_INSTRUCTIONS": self.instructions}
        return own | threads_environment(self.threads) | restricted

    @property
    def command(self) -> list[str]:
        flags = {
            "home": self.home,
            "base-dir": self.base_dir,
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "adapter-cache-bytes": self.adapter_cache_bytes,
            "max-num-seqs": self.max_num_seqs,
            "workers": self.workers,
            "train-share": self.train_share,
        }
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        return [
            str(Path(sys.executable).with_name("smolora")),
            "serve",
            *given,
            *([] if self.native else ["--no-native"]),
        ]


class Server(ServerProcess):
    """A running and ready server; as a context manager it kills the server at the end."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config.command, config.environment, config.log, "/ready")
        self._home = config.home

    def upload(self, name: str, directory: Path) -> str:
        """Publish the PEFT adapter in `directory`; return its digest."""
        fields = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
        files = {field: (file, (directory / file).read_bytes()) for field, file in fields.items()}
        answer = httpx.post(f"{self.url}/adapters/{name}", files=files, timeout=READY_WITHIN, trust_env=False)
        if answer.status_code != 201:
            raise RuntimeError(f"uploading {name}: {answer.status_code}: {answer.text}")
        return str(answer.json()["digest"])

    def stored(self, digest: str) -> list[Path]:
        """Return the files of an adapter's tensors: the published file and, if the server keeps one, the packed
        file."""
        adapters = self._home / "adapters"
        published = adapters / digest[:2] / digest / "adapter_model.safetensors"
        packed = adapters / "packed" / digest
        return [published, packed] if packed.exists() else [published]

    def metrics(self) -> Mapping[str, float]:
        """Return the metrics without labels, by name."""
        lines = httpx.get(f"{self.url}/metrics", trust_env=False).text.splitlines()
        pairs = (line.split(" ") for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}


def adapter_room(shape: BaseShape, dtype: str, device: str, num_ranks: int, *, native: bool = True) -> int:
    """Return the bytes of an adapter cache with room for adapters whose ranks add up to `num_ranks`."""
    is_native = native and DTYPES[dtype] is torch.bfloat16 and device == "cpu"
    row_format = ROW_FORMAT if is_native else RowFormat.of_torch(DTYPES[dtype], torch.device(device))
    return max(num_ranks * row_format.bytes_per_rank(shape), 1 << 20)  # the server refuses less


def import_seconds(threads: int) -> float:
    """Return the seconds until a new interpreter has imported what the server needs."""
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
