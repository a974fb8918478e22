"""The middleware that every request passes through before its route.

In order, it handles the proxy's path prefix, the request id, the span and log line, the allowed sites, CORS, the
API key, the engine's queue, the body and the answer's compression. It is a single ASGI middleware. With several,
each piece of a stream would pass through all of them.
"""

import logging
import re
import time
import uuid
from contextlib import ExitStack
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import InvalidInput, SmoloraError
from server.access.audit import client_address
from server.access.principal import Principal
from server.access.rates import KINDS
from server.api.authentication import FREE_METHODS, Authentication, end_of_key, is_exempt, principal_of, sender_of
from server.api.bodies import Body, KeyEnded, TooSlow
from server.api.deps import Services
from server.api.generation import ask_queue
from server.api.lanes import receiving
from server.api.problems import form_of
from server.api.refusals import Refusals
from server.api.representation import compact, is_compactable
from server.api.routes import LIST_BYTES, Resource, Routes
from server.api.sites import Sites
from server.api.streams import ClientGoneError
from server.api.tracing import RequestFacts, end_request, facts
from server.errors import REASONS, Draining, QueueFull, Unauthorized, Unavailable
from server.metrics.metrics import known_method
from server.storage.reserve import Reserve, is_database_locked, is_disk_failing
from server.telemetry.logs import Fields, place_of, request_id

_LIMITS = [f"X-RateLimit-{what}-{kind}" for what in ("Limit", "Remaining", "Reset") for kind in KINDS]
_EXPOSED = ["ETag", "Link", "Location", "Retry-After", "X-Request-Id", "X-Smolora-Warning", *_LIMITS]
"""Response headers that pages of allowed sites may read."""
_ABSOLUTE = re.compile(r"https?://(?P<host>[^/]+)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
_LINK = re.compile(r"<(/[^>]*)>")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CLIENT_GONE = 499
_LIMITED = ("max_bytes", "limit")  # reasons of a 403 that isn't an attempt at what is forbidden
_VERSIONS = ("1.0", "1.1")
_MAX_PATH = 200  # characters in a log line
_NOT_IDEMPOTENT = "is not supported here: each request adds something, so check what exists before you retry"
_DISK_FULL = Unavailable("the server's disk is full", retry_after=60.0, reason="disk")
_DISK_FAILS = Unavailable("the server's disk fails to read or write", retry_after=60.0)
_DATABASE_LOCKED = Unavailable("the database is locked by another process", retry_after=5.0)

log = logging.getLogger("smolora.api")


class Edge:
    """Middleware that identifies, logs, counts and admits requests.

    Every response has X-Request-Id, and headers that stop other sites from framing it and browsers from guessing
    its type. An unexpected error is answered with 500. A full or failing disk, or a database locked by another
    process, is answered with 503.
    """

    def __init__(self, app: ASGIApp, routes: Routes, services: Services) -> None:
        settings = services.settings
        self.app = app
        self._routes = routes
        self._services = services
        self._reserve = Reserve(settings.home)
        self._sites = Sites(settings.allowed_hosts, settings.allowed_origins, settings.host)
        self._authentication = Authentication(services.access, services.metrics.http, routes)
        self._refusals = Refusals(services.access.audit)
        for reason in REASONS:
            services.metrics.lanes.declare(reason, is_lane=False)
        self._admitting: ASGIApp = self._admit
        if settings.allowed_origins:
            self._admitting = CORSMiddleware(
                self._admit,
                allow_origins=settings.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        root_path = self._services.settings.root_path
        scope = _without_prefix(scope, root_path)
        resource, asked = self._routes.find(scope["path"]), Headers(scope=scope)
        given = asked.get("x-request-id", "")
        has_two_lengths = "transfer-encoding" in asked and "content-length" in asked
        own_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(own_id)
        address = scope["client"][0] if scope.get("client") else None
        client_address.set(address)
        found = RequestFacts()
        if self._services.tracer is not None and resource.all.watcher is None:
            found.span = self._services.tracer.request(asked)
        facts.set(found)
        receiving.set(receive)
        started = time.perf_counter()
        status = 0
        held: Message | None = None  # the start of an answer to compress
        method = scope["method"]
        if method == "HEAD" and "GET" in resource.methods and method not in resource.methods:
            scope = {**scope, "method": "GET"}  # uvicorn doesn't send the body

        async def answer(message: Message) -> None:
            nonlocal status, held
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = own_id
                headers["X-Content-Type-Options"] = "nosniff"
                if has_two_lengths:  # a proxy may disagree about where the request ends (RFC 9112, 6.3)
                    headers["Connection"] = "close"
                headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
                if "etag" not in headers:  # files of the pages have one
                    headers.setdefault("Cache-Control", "no-store")
                if root_path:
                    _add_prefix(headers, root_path)
                held = message if is_compactable(headers) else None
                if held is not None:
                    return
                status = message["status"]
            elif held is not None:
                start, held = held, None
                if not message.get("more_body", False):
                    await compact(asked, method, start, message)
                status = start["status"]
                await send(start)
            if method == "HEAD" and message.get("more_body", False):  # the rest may be endless
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise ClientGoneError
            await send(message)

        form = form_of(scope["path"])
        try:
            if scope.get("http_version", "1.1") not in _VERSIONS:
                await form.problem(505, "use HTTP/1.1")(scope, receive, answer)
            elif (fault := self._sites.fault(asked, resource.all.watcher)) is not None:
                found.refused = "site"
                await form.problem(403, fault)(scope, receive, answer)
            else:
                await self._admitting(scope, receive, answer)
        except TooSlow as error:  # no route was reading the body
            await form.problem(error.status_code, error.detail)(scope, receive, answer)
        except (ClientDisconnect, ClientGoneError):  # during the upload, or the end of an answer to HEAD
            status = status or _CLIENT_GONE
        except Exception as error:
            log.error("%s at %s", type(error).__name__, place_of(error))
            if status:
                raise ConnectionAbortedError("the response was cut off") from None
            unavailable = self._unavailable(error)
            response = form.internal() if unavailable is None else form.of_error(unavailable)
            await response(scope, receive, answer)
        finally:
            took = time.perf_counter() - started
            self._services.metrics.http.ended(method, resource.template, status or _CLIENT_GONE, took)
            if found.refused is not None and resource.all.watcher != "probe":  # probes aren't work
                self._services.metrics.lanes.refused(found.refused)
            if found.span is not None:
                end_request(found.span, scope, resource.template, status, own_id, principal_of(scope), found)
            if resource.all.watcher is None or status not in (200, 503):
                log.info(_line(scope, method, status, took, found))
            if status in (401, 403) and found.refused not in _LIMITED:
                await self._refusals.add(sender_of(scope), address or "", method, resource.template, status)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application, or refuse it."""
        resource = self._routes.find(scope["path"])
        body = Body(scope, receive, resource.all, self._services.settings.body_timeout)
        answer, limiters = send, self._services.limiters
        try:
            refusal = await self._refusal(scope, resource, body)
            principal = principal_of(scope)
            project = "" if principal is None else principal.project
            if principal is not None and _is_limited(principal):
                needs = resource.methods.get(scope["method"])
                is_charged = needs is not None and needs.is_list and not is_exempt(principal, needs)
                answer = partial(self._answer_with_limits, principal, is_charged, send)
            with ExitStack() as held:
                if refusal is None and principal is not None and resource.all.watcher is None:
                    try:
                        held.enter_context(limiters.connections.taken(project))
                    except QueueFull as error:
                        refusal = form_of(scope["path"]).of_error(error)
                if refusal is not None:
                    await body.drain()
                    await refusal(scope, receive, answer)
                    return
                with limiters.bodies.reserving(project) as body.reserve:
                    await self.app(scope, body.receive, answer)
        except KeyEnded as error:  # no route was reading the body
            await form_of(scope["path"]).of_error(Unauthorized(error.detail))(scope, receive, send)

    async def _refusal(self, scope: Scope, resource: Resource, body: Body) -> Response | None:
        """Return an error response if the request's key or headers, or the engine's queue, forbid it, else None.

        The queue is checked for one free place before the body is read, so that a refusal costs little. Later, the
        route checks it for as many places as the body needs. While the server is shutting down, requests that
        change something are refused.
        """
        form, method = form_of(scope["path"]), scope["method"]
        required = resource.methods.get(method)
        try:
            if not resource.is_open:
                await self._authentication.admit(scope, resource)
                body.end_of_key = None if method in FREE_METHODS else end_of_key(scope)
            if required is not None and required.adds and "idempotency-key" in Headers(scope=scope):
                raise InvalidInput.of("Idempotency-Key", _NOT_IDEMPOTENT)
            if required is not None and required.queued:
                ask_queue(self._services.of(principal_of(scope) or self._services.principal), 1)
            elif method not in FREE_METHODS and self._services.engine.draining:
                raise Draining
        except SmoloraError as error:
            return form.of_error(error)
        fault = body.fault()
        return None if fault is None else form.problem(*fault)

    async def _answer_with_limits(
        self, principal: Principal, is_charged: bool, send: Send, message: Message
    ) -> None:
        if message["type"] == "http.response.start":
            headers, rates = MutableHeaders(scope=message), self._services.access.rates
            if is_charged and (num_requests := int(headers.get("content-length", "0")) // LIST_BYTES):
                await rates.charge(principal, "requests", num_requests)
            headers.update(rates.headers(principal))
        await send(message)

    def _unavailable(self, error: Exception) -> Unavailable | None:
        """Return the error to answer with 503 if the cause of `error` is probably temporary, else None."""
        if self._reserve.is_disk_full(error):
            return _DISK_FULL
        if is_disk_failing(error):
            return _DISK_FAILS
        return _DATABASE_LOCKED if is_database_locked(error) else None


def _without_prefix(scope: Scope, root_path: str) -> Scope:
    """Return the scope with `root_path` removed from its path, unless a proxy has removed it already.

    If the path is an absolute URL (RFC 9112, 3.2.2), the URL's host replaces the `Host` header.
    """
    if absolute := _ABSOLUTE.fullmatch(scope["path"]):
        host = absolute["host"].encode("latin-1", "replace")
        headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope = {**scope, "path": absolute["path"] or "/", "headers": [*headers, (b"host", host)]}
    path = scope["path"]
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        scope = {**scope, "path": path[len(root_path) :] or "/"}
    return scope


def _add_prefix(headers: MutableHeaders, root_path: str) -> None:
    """Prepend `root_path` to the paths in an answer's headers."""
    if headers.get("location", "").startswith("/"):
        headers["location"] = root_path + headers["location"]
    if "link" in headers:
        headers["link"] = _LINK.sub(lambda found: f"<{root_path}{found[1]}>", headers["link"])


def _is_limited(principal: Principal) -> bool:
    quotas = (principal.quota, principal.project_quota)
    return any((quota.requests_per_minute, quota.tokens_per_minute) != (None, None) for quota in quotas)


def _line(scope: Scope, method: str, status: int, seconds: float, found: RequestFacts) -> Fields:
    """Return a request's log line."""
    who: dict[str, str] = {}
    if (principal := principal_of(scope)) is not None:
        who = {"key": principal.key_id, "project": principal.project}
    client = scope["client"][0] if scope.get("client") else "-"
    return Fields(
        method=known_method(method),
        path=scope["path"][:_MAX_PATH],
        status=status,
        ms=round(seconds * 1e3, 1),
        **who,
        **dict(found.fields()),
        client=client,
    )
