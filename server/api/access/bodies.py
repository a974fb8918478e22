"""Bodies on their way: how long they may take, and how much memory those that are held may take together."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.allocator import return_freed_memory
from server.api.access.places import RETRY_SECONDS
from server.api.errors.faults import form_of
from server.errors import QueueFull
from server.metrics.lanes import LaneMetrics

PROGRESS_BYTES = 16 << 10
"""What has to come within the time, where it isn't the rest: a byte now and then is no progress."""

MAX_BYTES_IN_FLIGHT = 256 << 20
SMALL_BODY_BYTES = 64 << 10
_BODIES = "bodies"  # in metrics
_DRAIN_BYTES = 64 << 20
_DRAIN_SECONDS = 10.0


class _Late(HTTPException):
    """FastAPI lets this kind alone through while it reads a body."""


class BodyTimeout:
    """Refuses a body (408) that makes no progress for so many seconds in which somebody waits for it."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        waited, received, is_whole = 0.0, 0, False

        async def timed() -> Message:
            nonlocal waited, received, is_whole
            if is_whole:  # what comes now is that the client leaves
                return await receive()
            start = loop.time()
            try:
                async with asyncio.timeout(self._seconds - waited):
                    message = await receive()
            except TimeoutError:
                raise _Late(408, "the body took too long: SMOLORA_BODY_TIMEOUT has the seconds") from None
            waited += loop.time() - start
            received += len(message.get("body", b""))
            if received >= PROGRESS_BYTES:
                waited, received = 0.0, 0
            is_whole = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, timed, send)
        except _Late as error:  # another middleware was reading
            await form_of(scope["path"]).problem(error.status_code, error.detail)(scope, receive, send)


class BytesInFlight:
    """The bytes of bodies that are in memory, by project. `held` bounds them: three quarters for one project.

    A body of up to SMALL_BODY_BYTES is counted and never refused. Once a burst is over, its memory is returned to
    the system. For one event loop.
    """

    def __init__(self, max_bytes: int = MAX_BYTES_IN_FLIGHT, metrics: LaneMetrics | None = None) -> None:
        self._max_bytes = max_bytes
        self._share = max_bytes - max_bytes // 4
        self._held: Counter[str] = Counter()
        self._peak = 0
        self._metrics = metrics
        if metrics is not None:
            metrics.declare(_BODIES, is_lane=False)

    @property
    def num_bytes(self) -> int:
        return self._held.total()

    @contextmanager
    def held(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Yield what to call with the size of each piece of a body, which is held within the context.

        It raises QueueFull, and doesn't count the piece, if bodies take too much memory.
        """
        own = 0

        def add(num_bytes: int) -> None:
            nonlocal own
            total, of_owner = self.num_bytes + num_bytes, self._held[owner] + num_bytes
            if own + num_bytes > SMALL_BODY_BYTES and (total > self._max_bytes or of_owner > self._share):
                if self._metrics is not None:
                    self._metrics.refused(_BODIES)
                raise QueueFull("too many large bodies at once", RETRY_SECONDS)
            own += num_bytes
            self._held[owner] += num_bytes
            self._peak = max(self._peak, total)

        try:
            yield add
        finally:
            self._held[owner] -= own
            if not self._held[owner]:
                del self._held[owner]
            if self._peak > self._max_bytes // 4 and self.num_bytes < self._peak // 4:
                self._peak = 0
                threading.Thread(target=return_freed_memory, name="return-memory", daemon=True).start()


async def drain(scope: Scope, receive: Receive) -> None:
    """Read some of what is still coming: a client that is cut off while it sends would never see the answer."""
    if "expect" in Headers(scope=scope):
        return  # it asked first, and has sent nothing
    left = _DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
