"""Reads of adapters. One that has begun can't be stopped: whoever asks for the same again waits for that one."""

from collections.abc import Callable
from concurrent.futures import Executor, Future

from server.model.rank_rows import Stored

Load = Callable[[str], Stored]
NUM_READERS = 8
"""Threads that read: one that must fetch its adapter from an object store may take most of a minute."""


class Reads:
    """`wake` is called, from another thread, when one has ended or was cancelled."""

    def __init__(self, load: Load, readers: Executor, wake: Callable[[], None]) -> None:
        self._load = load
        self._readers = readers
        self._wake = wake
        self._left: dict[str, Future[Stored]] = {}  # under way, and nobody waits for them

    def begin(self, digest: str) -> Future[Stored]:
        """One that is awaited from now on: that which was left and is still under way, or a new one."""
        self._forget_ended()
        reading = self._left.pop(digest, None)
        if reading is None:
            reading = self._readers.submit(self._load, digest)
            reading.add_done_callback(lambda _: self._wake())
        return reading

    def leave(self, digest: str, reading: Future[Stored]) -> None:
        """Nobody awaits it any more. One that has not begun never does: others' may wait behind it."""
        self._forget_ended()
        if not (reading.cancel() or reading.done()):
            self._left[digest] = reading

    def _forget_ended(self) -> None:
        self._left = {digest: reading for digest, reading in self._left.items() if not reading.done()}
