"""Processes that end when the one that started them dies, however it dies."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process once `parent`, which started it, has died; exit at once where it has.

    The kernel watches the *thread* that started this process, so that one must stay as long. Where the kernel
    can't (it isn't Linux), `has_lost_parent` is to be asked now and then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if has_lost_parent(parent):  # before the kernel was told
        os._exit(1)


def has_lost_parent(parent: int) -> bool:
    """Whether `parent`, which started this process, has died."""
    return os.getppid() != parent
