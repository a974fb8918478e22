"""Check whether a process keeps the memory that it frees.

Our server asks for this setting, and every peer gets it. The check asks the C library itself, so that the report
states the actual behaviour.
"""

import ctypes

from server.system.memory import KEEP_BYTES

TUNABLES = f"glibc.malloc.mmap_threshold={KEEP_BYTES}:glibc.malloc.trim_threshold={2**64 - 1}"
"""The settings of `keep_freed_memory` as GLIBC_TUNABLES, for a process that can't call it."""
KEPT, NOT_KEPT = "our allocator's settings", "**not our allocator's settings**"
_PROBE = 64 << 20  # bytes: more than glibc takes from its heap by default


class _Mallinfo2(ctypes.Structure):
    """The struct mallinfo2 of <malloc.h>."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )
    hblks: int  # number of blocks allocated with mmap


def keeps_freed_memory() -> bool:
    """Return whether a large block comes from the heap, which is kept. Return False if the C library can't say."""
    library = ctypes.CDLL(None)
    try:
        mallinfo2, malloc, free = library.mallinfo2, library.malloc, library.free
    except AttributeError:  # not glibc, or an old one
        return False
    mallinfo2.restype = _Mallinfo2
    malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    free.argtypes, free.restype = (ctypes.c_void_p,), None
    before = mallinfo2().hblks
    block = malloc(_PROBE)
    mapped = mallinfo2().hblks > before
    free(block)
    return block is not None and not mapped


def described(kept: bool) -> str:
    return KEPT if kept else NOT_KEPT
