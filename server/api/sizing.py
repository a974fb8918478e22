"""How much memory the engine's two caches get where nobody says: by what the machine has free.

On a CPU the system hands pages out as they are first written, so these are bounds, not what is taken at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import Settings

_SHARE = 8
"""Each cache takes at most one part in so many of the memory that is free: others live on the machine, too."""
_SHARE_OF_CUDA = 3  # where the card is ours
_MIN_ADAPTER_BYTES, _MAX_ADAPTER_BYTES = 64 << 20, 8 << 30
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CacheSizes:
    """Bytes for keys and values, and for resident adapters."""

    kv_cache: int
    adapter_cache: int


def cache_sizes(
    settings: Settings, free: int, *, is_cuda: bool, kv_bytes_per_token: int, max_model_len: int
) -> CacheSizes:
    """The settings' sizes, else a share of the `free` bytes.

    For keys and values never less than one full sequence needs, nor more than all that run at once do.
    """
    share = free // (_SHARE_OF_CUDA if is_cuda else _SHARE)
    one = max_model_len * kv_bytes_per_token
    kv_cache = min(max(share, one), settings.max_num_seqs * one)
    adapter_cache = min(max(share, _MIN_ADAPTER_BYTES), _MAX_ADAPTER_BYTES)
    return CacheSizes(int(settings.kv_cache_bytes or kv_cache), int(settings.adapter_cache_bytes or adapter_cache))


def free_bytes(device: torch.device) -> int:
    """What the device has free now; on a CPU also what the container's limit leaves."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = [size for size in (_meminfo(), _cgroup()) if size is not None]
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _meminfo(file: Path = _MEMINFO) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _cgroup(root: Path = _CGROUP) -> int | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
