"""Whether a process keeps the memory that it frees: what our server asks for, and every peer is given.

Asked of the C library itself, so that the report says what was, not what was meant.
"""

import ctypes

from server.system.memory import KEEP_BYTES

TUNABLES = f"glibc.malloc.mmap_threshold={KEEP_BYTES}:glibc.malloc.trim_threshold={2**64 - 1}"
"""What `keep_freed_memory` sets, as GLIBC_TUNABLES for a process that can't call it."""
KEPT, NOT_KEPT = "our allocator's settings", "**not our allocator's settings**"
_PROBE = 64 << 20  # bytes: more than glibc ever takes from its heap by itself


class _Mallinfo2(ctypes.Structure):
    """<malloc.h>"""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )
    hblks: int  # blocks that were mapped by themselves


def keeps_freed_memory() -> bool:
    """Whether a large block comes from the heap, which is kept; False, too, where the C library doesn't tell."""
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
