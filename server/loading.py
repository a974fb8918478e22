"""Loads what a process is made of without looking for garbage in it.

The libraries of a server are half a million objects that stay until the process ends. Python's collector of cycles
walks through them again and again while they are made, which takes a quarter of the start, and again in each full
collection later on, while no thread runs Python, the engine's neither.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Nothing is collected meanwhile, and what is there at the end is left out of collections for good.

    What nothing refers to is freed as ever; only cycles that exist at the end stay.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
