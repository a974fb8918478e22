"""Clients that wait, listen or download, and leave, or lose their key meanwhile: either is noticed at once."""

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

_reading = CapacityLimiter(4)  # pieces of downloads that are read at once: other threads have more urgent things


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The work's result. Where the client leaves first, the work is cancelled and ClientGoneError raised; where
    its key is revoked or expires, Unauthorized.

    The request's body must have been read.
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
    """Cancel the task and wait for its end."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # it has been looked at: asyncio need not complain


class Download(Response):
    """So many bytes, each piece read once the one before is sent. `close` runs at the end, whatever the end is.

    What fails before the first piece is an ordinary error response; what fails later cuts the answer off.
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
    """Server-sent events. `close` runs at the end, whatever the end is, even where nothing was ever sent.

    The status line goes out with the first event, so that what fails before it is an ordinary error response;
    what fails later is an `event: error` with the problem as its data, and the end.
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
