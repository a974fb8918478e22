"""How threads of a process that has an engine, or streams for many, take turns."""

import sys

_INTERVAL = 0.0005


def switch_quickly() -> None:
    """Let a thread keep the GIL for half a millisecond when another wants it.

    The engine's thread lets go of it in every kernel, and with Python's 5 ms would wait that long to get it back
    from the event loop, many times a step.
    """
    sys.setswitchinterval(_INTERVAL)
