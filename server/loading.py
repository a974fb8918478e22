"""Loads what a process is made of without looking for garbage in it.

The libraries of a server are some million objects, none of which goes before the process ends. Python's collector of
cycles walks through all of them several times while they are made, which takes a quarter of the start, and again
at each full collection later on: a tenth of a second or two in which no thread runs Python, the engine's neither.
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
