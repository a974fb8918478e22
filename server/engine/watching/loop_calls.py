"""Calls on an event loop by another thread, which goes on at once.

`call_soon_threadsafe` lets go of the GIL while it wakes the loop, and on a busy machine the loop then often is
what goes on: the thread waits until all that it was called for is done. Here the GIL is kept until the thread lets
go of it by itself, as the engine's does for a step's forward pass, beside which the loop can do its part.
"""

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_libc = ctypes.PyDLL(None)  # whose functions are called with the GIL held
_write = _libc.write
_write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
_write.restype = ctypes.c_ssize_t


class LoopCalls:
    """Functions on their way to a loop, in order. `close` it on that loop, once nobody calls any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._functions: deque[Callable[[], None]] = deque()
        self._reader, self._writer = os.pipe()
        for descriptor in (self._reader, self._writer):
            os.set_blocking(descriptor, False)
        loop.add_reader(self._reader, self._run)

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call the function; nothing where the loop has ended."""
        self._functions.append(function)
        _write(self._writer, b"\0", 1)  # fails where the loop has much to read already, which wakes it as well

    def close(self) -> None:
        """Call nothing more."""
        self._functions.clear()
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def _run(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        try:
            while self._functions:
                self._functions.popleft()()
        finally:
            if self._functions:  # one before them raised: the loop says so, and goes on with them
                self._loop.call_soon(self._run)
