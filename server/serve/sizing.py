"""How much memory the engine's two caches get where nobody says: by what the machine has free.

On a CPU the system hands pages out as they are first written, so these are bounds, not what is taken at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from server.cgroups import memory_left
from server.config import Settings
from server.engine.scheduler import SchedulerLimits
from server.errors import StartupError
from server.model.base.config import ModelConfig

_SHARE = 8
"""On a CPU each cache takes at most one part in so many of the memory that is free: others live there, too."""
_MIN_ADAPTER_BYTES, _MAX_ADAPTER_BYTES = 64 << 20, 8 << 30
_PROCESS_BYTES = 512 << 20
"""What each process takes of a GPU besides tensors: its context, and what lies between them."""
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class CacheSizes:
    """Bytes for keys and values, and for resident adapters."""

    kv_cache: int
    adapter_cache: int


def cpu_caches(settings: Settings, free: int, one: int) -> CacheSizes:
    """The settings' sizes, else a share each of the `free` bytes.

    For keys and values never less than `one` full sequence needs, nor more than all that run at once do.
    """
    share = free // _SHARE
    return CacheSizes(
        int(settings.kv_cache_bytes or min(max(share, one), settings.max_num_seqs * one)),
        int(settings.adapter_cache_bytes or min(max(share, _MIN_ADAPTER_BYTES), _MAX_ADAPTER_BYTES)),
    )


def gpu_caches(settings: Settings, free: int, total: int, one: int, step: int) -> CacheSizes:
    """The settings' sizes, else two thirds and one third of what is left of a GPU's `free` bytes: without
    training's share of the `total`, the `step` bytes that a step's tensors take, and what processes take.

    At least and at most as much as of `cpu_caches`. Raises StartupError where that isn't left.
    """
    left = free - int(settings.training_memory * total) - step - (1 + settings.workers) * _PROCESS_BYTES
    most = min(left * 2 // 3, left - _MIN_ADAPTER_BYTES)
    keys_and_values = min(max(most, one), settings.max_num_seqs * one)
    kv_cache = int(settings.kv_cache_bytes or keys_and_values)
    adapters = min(max(left - kv_cache, _MIN_ADAPTER_BYTES), _MAX_ADAPTER_BYTES)
    adapter_cache = int(settings.adapter_cache_bytes or adapters)
    if kv_cache + adapter_cache > left and not (settings.kv_cache_bytes and settings.adapter_cache_bytes):
        raise StartupError(
            f"the GPU has {_mb(free)} free, and {_mb(max(left, 0))} without training's share and a step; "
            f"caches of {_mb(kv_cache)} and {_mb(adapter_cache)} are the least: lower SMOLORA_MAX_MODEL_LEN, "
            "SMOLORA_MAX_NUM_SEQS or SMOLORA_TRAIN_MEMORY, or train elsewhere (SMOLORA_WORKERS=0)"
        )
    return CacheSizes(kv_cache, adapter_cache)


def gpu_share(settings: Settings, total: int) -> float:
    """What part of a GPU of `total` bytes the server's tensors may take: what training leaves."""
    if not settings.workers:
        return 1.0
    return max(0.0, 1 - settings.training_memory - (1 + settings.workers) * _PROCESS_BYTES / total)


def step_bytes(base: ModelConfig, itemsize: int, limits: SchedulerLimits, max_model_len: int) -> int:
    """What a step's tensors take on a GPU, at most and all at once.

    Decodes gather a layer's keys and values, padded to the longest; beside them lie their scores, and the widest
    activations of all tokens.
    """
    rows, tokens = limits.max_num_seqs, limits.max_num_seqs + limits.max_prefill_tokens
    gathered = 2 * base.kv_size + 3 * base.num_heads  # with scores, weights and a mask's copy, a position
    activations = 4 * base.hidden_size + 2 * (base.q_size + 2 * base.kv_size) + 5 * base.intermediate_size
    bias = 2 * limits.chunk_size * max_model_len * (base.num_heads // base.num_kv_heads)  # of one prompt's chunk
    logits = 6 * 4 * rows * base.vocab_size  # fp32, sorted, as probabilities, with noise
    return itemsize * (rows * max_model_len * gathered + tokens * activations + bias) + logits


def free_bytes() -> int:
    """Return what the machine has free now, within the limits of the container or service."""
    found = [size for size in (_meminfo(), memory_left()) if size is not None]
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def _meminfo(file: Path = _MEMINFO) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
