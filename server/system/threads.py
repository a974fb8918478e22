"""Helpers that give the engine's thread precedence over other threads for processors and the GIL."""

import os
import sys
import threading
from contextlib import suppress

NICE = 10
_SWITCH_SECONDS = 0.0005


def step_back() -> None:
    """Give the calling thread, and threads that it starts, a low priority, so that the engine's steps come first.

    Only Linux has priorities of threads; elsewhere this is a no-op.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def switch_quickly() -> None:
    """Shorten CPython's thread switch interval from 5 ms to 0.5 ms.

    The engine's thread releases the GIL in every kernel, many times a step, and would otherwise wait 5 ms each
    time to get the GIL back from the event loop.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
