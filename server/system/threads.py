"""Lowers the priority of threads whose work may wait for the engine's steps.

How threads of a process that has an engine, or streams for many, take turns.
"""

import os
import sys
import threading
from contextlib import suppress

NICE = 10


def step_back() -> None:
    """Give the calling thread a low priority, if the system has priorities for threads. Threads that it starts
    inherit it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


_INTERVAL = 0.0005


def switch_quickly() -> None:
    """Let a thread keep the GIL for half a millisecond when another wants it.

    The engine's thread lets go of it in every kernel, and with Python's 5 ms would wait that long to get it back
    from the event loop, many times a step.
    """
    sys.setswitchinterval(_INTERVAL)
