"""Memory in huge pages: for what is read in pieces from all over it, which small pages make slower to find."""

import contextlib
import math
import mmap

import numpy as np
import torch

HUGE_PAGE = 2 << 20


def in_huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU that holds anything. Its pages are huge ones where the system has those, and are taken
    once they are written. Raises MemoryError where there is no room for it."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE)
    except OSError as e:
        raise MemoryError(f"no room for {size} bytes") from e
    with contextlib.suppress(AttributeError, OSError):  # other systems and kernels
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return torch.from_numpy(whole[start : start + size]).view(dtype).view(shape)
