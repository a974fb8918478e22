"""Bodies as they come in: how long one may take, how large it may be, and how much memory all take together."""

import asyncio
import math
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
"""What has to come within the time, unless it is the rest: a byte now and then is no progress."""

MAX_BYTES_IN_FLIGHT = 256 << 20
SMALL_BODY_BYTES = 64 << 10
_BODIES = "bodies"  # in metrics
_DRAIN_BYTES = 64 << 20
_DRAIN_SECONDS = 10.0


class TooSlow(HTTPException):
    """FastAPI passes on this kind of exception alone while it reads a body."""


class KeyEnded(HTTPException):
    """Likewise."""


class Body:
    """A request's body as it comes in: bounded in time, in size and in memory, and only while its key is valid.

    It must make progress within `seconds` in which somebody waits for it. A JSON body is also refused if
    others take too much memory; uploads are spooled to disk.
    """

    end_of_key: "asyncio.Future[None] | None" = None
    hold: Callable[[int], None] | None = None  # by BytesInFlight

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
        """Return a status and a reason if the request's headers say that its body can't be taken."""
        headers, limit = Headers(scope=self._scope), self._max_bytes
        if headers.get("content-encoding", "identity").lower() != "identity":
            return 415, "the body must come without Content-Encoding"
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            return 413, self._too_large
        return None

    async def receive(self) -> Message:
        """Return the next message. Raises HTTPException: 401, 408, 413 or 429."""
        message = await self._next()
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            await self.drain()
            raise HTTPException(413, self._too_large)
        if num_bytes and self.hold is not None and not self._required.upload:
            try:
                self.hold(num_bytes)
            except QueueFull as error:
                await self.drain()
                retry = {"Retry-After": str(math.ceil(error.retry_after))}
                raise HTTPException(429, str(error), headers=retry) from None
        return message

    async def drain(self) -> None:
        """Read some of the rest, so that the client sees the answer. Raises HTTPException: 401 or 408."""
        await drain(self._scope, self._next)

    @property
    def _too_large(self) -> str:
        hint = self._required.hint and f"; {self._required.hint}"
        return f"the body is larger than {self._max_bytes} bytes, the most that is taken here{hint}"

    async def _next(self) -> Message:
        if self._is_whole:  # the next message is that the client leaves
            return await self._receive()
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self._seconds - self._waited):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(408, "the body took too long: SMOLORA_BODY_TIMEOUT has the seconds") from None
        self._waited += loop.time() - start
        self._progress += len(message.get("body", b""))
        if self._progress >= PROGRESS_BYTES:
            self._waited, self._progress = 0.0, 0
        self._is_whole = not message.get("more_body", False)
        if self.end_of_key is not None and self.end_of_key.done():
            raise KeyEnded(401, LOST)
        return message


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
