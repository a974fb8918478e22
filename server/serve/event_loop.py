"""The server's event loop: asyncio's, but each turn handles only a few of the files that are ready.

A request waits for several turns of the loop: to be read, to be checked, to be answered. asyncio handles every
ready file in each turn. While a hundred clients send large bodies, such a turn takes 0.2 s on two busy processors.
"""

import asyncio
from collections import deque
from selectors import DefaultSelector, SelectorKey

MAX_READY = 8
"""The most files that are handled in a turn."""


class FewAtOnce(DefaultSelector):
    """A selector that returns at most `MAX_READY` files at once. The others come first in the next calls."""

    def __init__(self) -> None:
        super().__init__()
        self._later: deque[tuple[SelectorKey, int]] = deque()

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Return ready files and their events. If files are left from the last call, don't wait."""
        if not self._later:
            self._later.extend(super().select(timeout))
        some = [self._later.popleft() for _ in range(min(MAX_READY, len(self._later)))]
        registered = self.get_map()
        # If a file was closed, or is waited for in another way, the key in the map is another one or missing.
        return [(key, events) for key, events in some if registered.get(key.fd) is key]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new loop. It isn't made the thread's current loop."""
    return asyncio.SelectorEventLoop(FewAtOnce())
