"""Room on the disk that is left to what runs already."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.config import Settings
from server.errors import Unavailable

LOOK_BYTES = 16 << 20
"""Of an upload, between two looks at the disk."""
_RETRY_SECONDS = 60.0


def require_space(settings: Settings, num_bytes: int = 0) -> None:
    """Raise Unavailable if HOME's disk, with `num_bytes` more, has less free than uploads and jobs must leave."""
    if shutil.disk_usage(settings.home).free - num_bytes < settings.min_free_bytes:
        message = "the server's disk is full"
        if settings.min_free_bytes:
            least = settings.min_free_bytes.human_readable()
            message = f"the server's disk has less than {least} left (SMOLORA_MIN_FREE_BYTES)"
        raise Unavailable(message, retry_after=_RETRY_SECONDS)


class Spooling:
    """The bytes that uploads in flight still have to write to the disk. For one event loop."""

    def __init__(self) -> None:
        self._num_pending = 0

    @contextmanager
    def announced(self, settings: Settings, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Keep room for an upload within the context; yield what to call with the size of each of its pieces.

        `num_bytes` are what it announces, 0 if it doesn't. Raises Unavailable if the disk has no room for it and
        for the rest of the others; so does the call, which looks again every LOOK_BYTES.
        """
        require_space(settings, self._num_pending + num_bytes)
        self._num_pending += num_bytes
        pending, unseen = num_bytes, 0

        def received(size: int) -> None:
            nonlocal pending, unseen
            written = min(size, pending)
            pending -= written
            self._num_pending -= written
            unseen += size
            if unseen >= LOOK_BYTES:
                unseen = 0
                require_space(settings, self._num_pending)

        try:
            yield received
        finally:
            self._num_pending -= pending
