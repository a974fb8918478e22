"""What happens to every request before a route sees it: an id and a log line, a bound on its body.

Plain ASGI, since one of them sees each piece of each stream. Between the two, RequestContext and BodyLimit, is
what `server.api.access` has.
"""

import logging
import math
import re
import time
import uuid
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access.authentication import principal_of
from server.api.access.bodies import BytesInFlight, drain
from server.api.access.lanes import receiving
from server.api.errors.faults import form_of
from server.api.routes import Routes
from server.api.telemetry.facts import RequestFacts, facts
from server.api.telemetry.spans import end_request
from server.errors import QueueFull, Unavailable
from server.logs import Fields, place_of, request_id
from server.metrics.http import HttpMetrics
from server.tracing.spans import Tracer
from server.training.queue.reserve import Reserve, is_database_locked, is_disk_failing

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CLIENT_GONE = 499
_VERSIONS = ("1.0", "1.1")
_MAX_PATH = 200  # characters of a line
_DISK_FULL = Unavailable("the server's disk is full", retry_after=60.0)
_DISK_FAILS = Unavailable("the server's disk fails to read or write", retry_after=60.0)
_DATABASE_LOCKED = Unavailable("the database is locked by another process", retry_after=5.0)

log = logging.getLogger("smolora.api")


class RequestContext:
    """Gives every request an id, every response X-Request-Id, the log one line without anybody's text, and counts.

    No other site's page may frame a response, and no browser may guess its type.

    What nobody foresaw becomes a 500 here. A disk that fails, or has no room under `home`, is a 503, whichever
    route it was, and so is a database that somebody else has locked.
    """

    def __init__(
        self, app: ASGIApp, routes: Routes, home: Path, metrics: HttpMetrics, tracer: Tracer | None = None
    ) -> None:
        self.app = app
        self._routes = routes
        self._tracer = tracer
        self._metrics = metrics
        self._reserve = Reserve(home)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        given = asked.get("x-request-id", "")
        has_two_lengths = "transfer-encoding" in asked and "content-length" in asked
        own_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(own_id)
        told = RequestFacts()
        resource = self._routes.find(scope["path"])
        if self._tracer is not None and resource.watcher is None:
            told.span = self._tracer.request(asked)
        facts.set(told)
        receiving.set(receive)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = own_id
                headers["X-Content-Type-Options"] = "nosniff"
                if has_two_lengths:  # a proxy may see a request's end elsewhere (RFC 9112, 6.3)
                    headers["Connection"] = "close"
                headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
            await send(message)

        try:
            if scope.get("http_version", "1.1") in _VERSIONS:
                await self.app(scope, receive, send_with_id)
            else:
                await form_of(scope["path"]).problem(505, "use HTTP/1.1")(scope, receive, send_with_id)
        except ClientDisconnect:  # while its upload came in: nobody is there to be told
            status = status or _CLIENT_GONE
        except Exception as error:
            log.error("%s at %s", type(error).__name__, place_of(error))
            if status:
                raise ConnectionAbortedError("the response was cut off") from None
            form, unavailable = form_of(scope["path"]), self._unavailable(error)
            response = form.internal() if unavailable is None else form.of_error(unavailable)
            await response(scope, receive, send_with_id)
        finally:
            took = time.perf_counter() - started
            self._metrics.ended(scope["method"], resource.template, status or _CLIENT_GONE, took)
            if told.span is not None:
                end_request(told.span, scope, resource.template, status, own_id, principal_of(scope), told)
            if resource.watcher is None or status not in (200, 503):
                log.info(_line(scope, status, took, told))

    def _unavailable(self, error: Exception) -> Unavailable | None:
        """What a client is told of it, where that is for a while."""
        if self._reserve.is_disk_full(error):
            return _DISK_FULL
        if is_disk_failing(error):
            return _DISK_FAILS
        return _DATABASE_LOCKED if is_database_locked(error) else None


class BodyLimit:
    """Refuses a body that is larger than its path may take, by its announced length or while it comes in.

    A JSON body is also refused if others take too much memory just now. An encoded body
    is refused, too: nothing here decodes one.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Routes,
        in_flight: BytesInFlight,
    ) -> None:
        self.app = app
        self._routes = routes
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        resource = self._routes.find(scope["path"])
        limit, hint = resource.max_bytes, resource.hint and f"; {resource.hint}"
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            await drain(scope, receive)
            form = form_of(scope["path"])
            await form.problem(415, "the body must come without Content-Encoding")(scope, receive, send)
            return
        announced = headers.get("content-length", "")
        too_large = f"the body is larger than {limit} bytes, the most that is taken here{hint}"
        if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            await drain(scope, receive)
            await form_of(scope["path"]).problem(413, too_large)(scope, receive, send)
            return
        received = 0
        principal = principal_of(scope)
        with self._in_flight.held("" if principal is None else principal.project) as hold:

            async def counted() -> Message:
                nonlocal received
                message = await receive()
                num_bytes = len(message.get("body", b""))
                received += num_bytes
                if received > limit:
                    await drain(scope, receive)
                    raise HTTPException(413, too_large)  # FastAPI lets this kind alone through while it reads
                if num_bytes and not resource.takes_uploads:
                    try:
                        hold(num_bytes)
                    except QueueFull as error:
                        await drain(scope, receive)
                        retry = {"Retry-After": str(math.ceil(error.retry_after))}
                        raise HTTPException(429, str(error), headers=retry) from None
                return message

            await self.app(scope, counted, send)


def _line(scope: Scope, status: int, seconds: float, told: RequestFacts) -> Fields:
    """What the log says of a request."""
    who: dict[str, str] = {}
    if (principal := principal_of(scope)) is not None:
        who = {"key": principal.key_id, "project": principal.project}
    client = scope["client"][0] if scope.get("client") else "-"
    return Fields(
        method=scope["method"],
        path=scope["path"][:_MAX_PATH],
        status=status,
        ms=round(seconds * 1e3, 1),
        **who,
        **dict(told.fields()),
        client=client,
    )
