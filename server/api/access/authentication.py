"""Who asks: each request's key, its project and scopes, and what is left of its minute.

A key comes as `Authorization: Bearer`. The operator's may be at work in one project: `OpenAI-Project` names it.
A body that still comes in when its key is revoked, or expires, is refused.
"""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import NotFound, SmoloraError
from server.access.access import Access
from server.access.principal import ANONYMOUS, Principal
from server.api.access.bodies import drain
from server.api.access.guesses import Guesses
from server.api.errors.faults import form_of
from server.api.errors.near_names import unknown_path
from server.api.routes import Routes
from server.errors import Forbidden, Unauthorized
from server.metrics.http import HttpMetrics

PROJECT_HEADER = "OpenAI-Project"
_FREE_METHODS = ("GET", "HEAD", "OPTIONS")  # which count for no rate
LOST = "the key was revoked, or has expired"
_PRINCIPAL, _END = "principal", "end_of_key"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def principal_of(scope: Scope) -> Principal | None:
    """Who sent the request; None where everybody may."""
    return cast("Principal | None", scope.get("state", {}).get(_PRINCIPAL))


def end_of_key(scope: Scope) -> "asyncio.Future[None] | None":
    """Done once the request's key is revoked or expires; None where none was needed."""
    end = scope.get("state", {}).get(_END)
    return None if end is None else cast("Callable[[], asyncio.Future[None]]", end)()


class _LostError(HTTPException):
    """FastAPI lets this kind alone through while it reads a body."""


class Authentication:
    """Lets a request in if its key may, and says what is left of its limits."""

    def __init__(self, app: ASGIApp, routes: Routes, access: Access, metrics: HttpMetrics) -> None:
        self.app = app
        self._routes = routes
        self._access = access
        self._metrics = metrics
        self._guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._routes.find(scope["path"]).is_open:
            await self.app(scope, receive, send)
            return
        try:
            principal = await self._admitted(scope)
        except SmoloraError as error:
            await drain(scope, receive)
            form = form_of(scope["path"])
            response = (
                form.problem(404, unknown_path(scope["path"], self._routes.static_paths))
                if isinstance(error, _NoPathError)
                else form.of_error(error)
            )
            await response(scope, receive, send)
            return
        scope.setdefault("state", {}).update(
            {_PRINCIPAL: principal, _END: partial(self._access.ring.end_of, principal)}
        )
        is_limited = any(
            (quota.requests_per_minute, quota.tokens_per_minute) != (None, None)
            for quota in (principal.quota, principal.project_quota)
        )
        told = self._told(principal, send) if is_limited else send
        if scope["method"] in _FREE_METHODS:
            await self.app(scope, receive, told)
            return
        try:
            await self.app(scope, _while_valid(self._access.ring.end_of(principal), receive), told)
        except _LostError as error:  # another middleware was reading
            await form_of(scope["path"]).of_error(Unauthorized(error.detail))(scope, receive, send)

    async def _admitted(self, scope: Scope) -> Principal:
        """Raises Unauthorized, Forbidden, RateLimited, or NotFound for what isn't there for this key."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if _CONTROL.search(path):  # routes pass over a line's end behind them, and scopes are no route's then
            raise _NoPathError
        secret = _secret(headers)
        principal = await self._access.ring.principal(secret)
        if principal is None:
            self._metrics.refused(self._access.ring.fault_of(secret))
            if secret is not None:
                await self._guesses.wrong(scope["client"][0] if scope.get("client") else "", secret)
            raise Unauthorized("send a valid key: Authorization: Bearer <key>")
        scopes = self._routes.find(path).scopes(method)
        if scopes is None and not principal.is_operator:
            raise _NoPathError
        if scopes is not None and not principal.may(scopes):
            needed = " or ".join(sorted(scopes))
            has = ", ".join(sorted(principal.scopes))
            if principal.key_id == ANONYMOUS:
                raise Forbidden(f"send a key with the scope {needed}: a client without one has {has}")
            raise Forbidden(f"this key lacks the scope {needed}: it has {has}")
        principal = self._at_work_in(headers.get(PROJECT_HEADER), principal)
        if method not in _FREE_METHODS:
            await self._access.rates.take(principal, "requests")
        return principal

    def _at_work_in(self, project: str | None, principal: Principal) -> Principal:
        if project is None or (project == principal.project and not principal.sees_all):
            return principal
        if not principal.is_operator:
            whose = "a client without a key works in" if principal.key_id == ANONYMOUS else "this key is one of"
            raise Forbidden(f"{whose} the project {principal.project}: leave out OpenAI-Project")
        found = self._access.ring.within(principal, project)
        if found is None and principal.key_id != ANONYMOUS:
            raise NotFound("there is no project of the name that OpenAI-Project gives")
        return found or principal  # OpenAI's clients send it by themselves where OPENAI_PROJECT_ID is set

    def _told(self, principal: Principal, send: Send) -> Send:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._access.rates.headers(principal).items():
                    headers[name] = value
            await send(message)

        return send_with_limits


def _while_valid(end: "asyncio.Future[None]", receive: Receive) -> Receive:
    """Hands a body on until the `end` of its key, and then raises _LostError."""
    is_whole = False

    async def received() -> Message:
        nonlocal is_whole
        message = await receive()
        if end.done() and not is_whole:
            raise _LostError(401, LOST)
        is_whole = not message.get("more_body", False)
        return message

    return received


class _NoPathError(NotFound):
    """What nobody, or the operator alone, may know of."""


def _secret(headers: Headers) -> str | None:
    """What the request brings as its key; None where it brings nothing, or an empty one."""
    if (given := headers.get("authorization")) is None:
        return None
    scheme, _, secret = given.partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else ""
