"""Bodies that stop on their way: whoever sends one is told so, and lets go of what waits for it."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors.faults import form_of

PROGRESS_BYTES = 16 << 10
"""What has to come within the time, where it isn't the rest: a byte now and then is no progress."""

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
