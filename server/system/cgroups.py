"""CPU and memory limits of this process's cgroups (v1 and v2). Containers and services have such limits.

A limit applies to a cgroup and everything below it, so the smallest limit between the process's own cgroup and the
root counts. In a container the visible root may be the container's own cgroup.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_processors(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return how many processors this process may use, by its affinity and its CPU quota (rounded up)."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root, own)
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Return the CPU quota in processors, such as 1.5, or None if there is no quota."""
    quotas = [_quota(place) for place in _places("cpu", root, own)]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_left(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Return the bytes that this process may still allocate, or None if its memory has no limit.

    Cached files that weren't read recently count as free, since the kernel can drop them.
    """
    sizes = [_left(place) for place in _places("memory", root, own)]
    return min((size for size in sizes if size is not None), default=None)


def _places(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups for a controller, and the folders above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, names, path = line.split(":", 2)
        if not names:  # version 2, perhaps alongside version 1
            mounts = [root, root / "unified"]
        elif controller in names.split(","):
            mounts = [root / controller, root / names]
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        if ".." in parts:  # the cgroup is outside of the mounted hierarchy
            parts = ()
        for mount in mounts:
            for end in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:end])


def _quota(place: Path) -> float | None:
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, (place / "cpu.max").read_text().split())
        return quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((place / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None  # -1: no quota
    return None


def _left(place: Path) -> int | None:
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((place / limit).read_text()) - int((place / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        with suppress(OSError, ValueError, KeyError):
            fields = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            left += int(fields[droppable])
        return max(0, left)
    return None
