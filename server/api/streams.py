"""Long responses that end at once if the client leaves or its key is revoked."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.authentication import end_of_key
from server.api.bodies import LOST
from server.api.lanes import client_left
from server.api.problems import form_of
from server.errors import Unauthorized

T = TypeVar("T")

_reading = CapacityLimiter(4)  # a separate limit, so that downloads don't delay other work in threads


class ClientGoneError(Exception):
    """The client left before the work was done, or wants no body because it sent HEAD."""


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[None, None, T]) -> T:
    """Await `work` and return its result. The caller must have read the request's body.

    If the client leaves before the work is done, cancel the work and raise ClientGoneError. If the request's key
    is revoked or expires first, cancel the work and raise Unauthorized.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(receive))
    losing = end_of_key(scope)
    try:
        watched: list[asyncio.Future[Any]] = [working, leaving, *([] if losing is None else [losing])]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if losing is not None and losing.done():
            raise Unauthorized(LOST)
        raise ClientGoneError
    finally:
        await _cancel(working)
        await _cancel(leaving)


async def _cancel(task: "asyncio.Future[T]") -> None:
    """Cancel the task and wait until it has ended."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks the exception as retrieved, so asyncio doesn't warn


class Download(Response):
    """A response of known length, whose pieces are read one at a time. `close` is always called at the end.

    A failure before the first piece becomes an ordinary error response. A later failure cuts the response off.
    """

    def __init__(
        self,
        pieces: Iterator[bytes],
        length: int,
        media_type: str,
        headers: Mapping[str, str],
        close: Callable[[], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.init_headers({**headers, "Content-Length": str(length)})
        self._pieces = pieces
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(scope, receive, self._send(send))
        except ClientGoneError:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        piece: bytes | None = await self._next()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while piece is not None:
            if piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes | None:
        return await to_thread.run_sync(next, self._pieces, None, limiter=_reading)


class EventStream(Response):
    """A response of server-sent events. `close` is always called at the end, even if nothing was sent.

    The status line is sent with the first event, so a failure before that event becomes an ordinary error
    response. A later failure ends the stream with an `event: error`, whose data describes the error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        for name, value in headers:
            self.headers.append(name, value)
        self._events = events
        self._close = close
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(scope, receive, self._send(send))
        except ClientGoneError:
            pass
        except Exception as error:
            if not self._has_begun:
                raise
            event = form_of(scope["path"]).event(error)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        async for event in self._events:
            if not self._has_begun:
                self._has_begun = True
                await send(self._start())
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
