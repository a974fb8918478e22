"""Memory in huge pages: for what is read in pieces from all over it, which small pages make slower to find."""

import contextlib
import ctypes
import math
import mmap

import numpy as np
import torch

HUGE_PAGE = 2 << 20
_POPULATE_WRITE = 23  # of madvise, from Linux 5.14 on; in no module of Python's
_SYSTEM = ctypes.CDLL(None)


def in_huge_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU that holds anything. Its pages are huge ones where the system has those, and are taken
    once they are written. Raises MemoryError where there is no room for it."""
    size = math.prod(shape) * dtype.itemsize
    try:
        # private: what may be shared, as mmap's is by itself, is the system's shared memory, which has none
        memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise MemoryError(f"no room for {size} bytes") from e
    with contextlib.suppress(AttributeError, OSError):  # other systems and kernels
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return torch.from_numpy(whole[start : start + size]).view(dtype).view(shape)


def take_pages(part: torch.Tensor) -> None:
    """Take the pages of a part of such a tensor now; what it holds stays, also what others write to it meanwhile.

    Where the system can't, or has no memory left, they are taken once they are written. No other thread waits: the
    call is one of ctypes', which lets go of the interpreter.
    """
    first = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = part.data_ptr() + part.nbytes - first
    with contextlib.suppress(AttributeError):
        _SYSTEM.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_WRITE)
