"""Limits on request bodies: the time and size of each body, and the memory of all bodies together."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

from server.api.lanes import RETRY_SECONDS
from server.api.routes import MAX_JSON_BYTES, MAX_UPLOAD_BYTES, Requirements
from server.errors import QueueFull
from server.metrics.metrics import LaneMetrics
from server.system.memory import return_freed_memory

LOST = "the key was revoked, or has expired"
PROGRESS_BYTES = 16 << 10
"""Bytes of a body that must arrive within the time limit, unless fewer bytes are left."""

MAX_BYTES_IN_FLIGHT = 256 << 20
SMALL_BODY_BYTES = 64 << 10
QUIET_SECONDS = 5.0
"""Freed memory is returned this long after a burst of bodies. Returning it stops every thread that allocates:
0.5 GB takes 0.14 s."""
_BODIES = "bodies"  # the label in metrics
_DRAIN_BYTES = 64 << 20
_DRAIN_SECONDS = 10.0


class TooSlow(HTTPException):
    """The error for a body that arrives too slowly.

    This is an HTTPException because FastAPI replaces any other exception that is raised while it reads a body.
    """


class KeyEnded(HTTPException):
    """The error for a request whose key is revoked or expires while the body is being received."""


class Body:
    """The body of a request while it is received. It is refused if it is too large, or its key becomes invalid.

    At least PROGRESS_BYTES must arrive every `seconds`, or the body is refused. A JSON body is also refused if all
    bodies together take too much memory. An upload isn't, because it is spooled to disk.
    """

    end_of_key: "asyncio.Future[None] | None" = None
    reserve: Callable[[int], None] | None = None  # the function that `BytesInFlight.reserving` yields

    def __init__(self, scope: Scope, receive: Receive, required: Requirements, seconds: float) -> None:
        self._scope = scope
        self._receive = receive
        self._required = required
        self._seconds = seconds
        self._max_bytes = MAX_UPLOAD_BYTES if required.upload else MAX_JSON_BYTES
        self._waited = 0.0
        self._progress = 0
        self._num_bytes = 0
        self._is_whole = False

    def fault(self) -> tuple[int, str] | None:
        """Return an HTTP status and a reason if the headers show that the body must be refused, else None."""
        headers, limit = Headers(scope=self._scope), self._max_bytes
        if headers.get("content-encoding", "identity").lower() != "identity":
            return 415, "the body must come without Content-Encoding"
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            return 413, self._too_large
        return None

    async def receive(self) -> Message:
        """Return the request's next ASGI message, usually a part of the body.

        Raise HTTPException: 401 if the key is no longer valid, 408 if the body is too slow, 413 if the body is too
        large, 429 if all bodies together take too much memory.
        """
        message = await self._next()
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            await self.drain()
            raise HTTPException(413, self._too_large)
        if num_bytes and self.reserve is not None and not self._required.upload:
            try:
                self.reserve(num_bytes)
            except QueueFull as error:
                await self.drain()
                raise HTTPException(429, str(error)) from error
        return message

    async def drain(self) -> None:
        """Read and discard some of the rest of the body, so that the client sees the answer.

        Raise HTTPException: 401 if the key is no longer valid, 408 if the body is too slow.
        """
        await drain(self._scope, self._next)

    @property
    def _too_large(self) -> str:
        hint = self._required.hint and f"; {self._required.hint}"
        return f"the body is larger than {self._max_bytes} bytes, the most that is accepted here{hint}"

    async def _next(self) -> Message:
        if self._is_whole:  # then the next message says that the client left
            return await self._receive()
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self._seconds - self._waited):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(408, "the body took too long: SMOLORA_BODY_TIMEOUT sets the limit") from None
        self._waited += loop.time() - start
        self._progress += len(message.get("body", b""))
        if self._progress >= PROGRESS_BYTES:
            self._waited, self._progress = 0.0, 0
        self._is_whole = not message.get("more_body", False)
        if self.end_of_key is not None and self.end_of_key.done():
            raise KeyEnded(401, LOST)
        return message


class BytesInFlight:
    """A limit on the memory of all bodies together. One project may use at most three quarters of it.

    A body of up to SMALL_BODY_BYTES counts towards the limit, but is never refused. `QUIET_SECONDS` after a burst
    of bodies, freed memory is returned to the operating system. Use each instance from one event loop only.
    """

    def __init__(self, max_bytes: int = MAX_BYTES_IN_FLIGHT, metrics: LaneMetrics | None = None) -> None:
        self._max_bytes = max_bytes
        self._share = max_bytes - max_bytes // 4
        self._reserved: Counter[str] = Counter()
        self._peak = 0
        self._timer: asyncio.TimerHandle | None = None
        if metrics is not None:
            metrics.declare(_BODIES, is_lane=False)

    @property
    def num_bytes(self) -> int:
        return self._reserved.total()

    @contextmanager
    def reserving(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that must be called with the size of each piece of a body of the project `owner`.

        The pieces count towards the limit until the context ends. If all bodies together would take too much
        memory, the function raises QueueFull, and the piece doesn't count.
        """
        own = 0

        def add(num_bytes: int) -> None:
            nonlocal own
            total, of_owner = self.num_bytes + num_bytes, self._reserved[owner] + num_bytes
            if own + num_bytes > SMALL_BODY_BYTES and (total > self._max_bytes or of_owner > self._share):
                raise QueueFull("too many large bodies at once", RETRY_SECONDS, reason=_BODIES)
            own += num_bytes
            self._reserved[owner] += num_bytes
            self._peak = max(self._peak, total)

        try:
            yield add
        finally:
            self._reserved[owner] -= own
            if not self._reserved[owner]:
                del self._reserved[owner]
            if self._peak > self._max_bytes // 4 and self.num_bytes < self._peak // 4:
                self._peak = 0
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(QUIET_SECONDS, self._return_memory)

    def _return_memory(self) -> None:
        """Return freed memory in a thread, unless another burst has begun, after which this is called again."""
        self._timer = None
        if self._peak <= self._max_bytes // 4:
            threading.Thread(target=return_freed_memory, name="return-memory", daemon=True).start()


async def drain(scope: Scope, receive: Receive) -> None:
    """Read and discard some of the body: a client that is cut off while it sends may never see the answer."""
    if "expect" in Headers(scope=scope):
        return  # the client waits for permission, and has sent nothing
    left = _DRAIN_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
