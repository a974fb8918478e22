"""Tries again what a server refuses that starts anew."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def patient(question: Callable[[], T], error: type[Exception], seconds: float) -> Callable[[], T]:
    """The same, asked again for so many seconds while it raises such an error; then that is raised."""

    def ask() -> T:
        until = time.monotonic() + seconds
        while True:
            try:
                return question()
            except error:
                if time.monotonic() > until:
                    raise
            time.sleep(random.uniform(0.05, 0.2))

    return ask
