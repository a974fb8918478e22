"""Lowers the priority of threads whose work may wait for the engine's steps."""

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
