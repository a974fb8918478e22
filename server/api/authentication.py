"""Authenticate requests by `Authorization: Bearer`, and slow down addresses that guess keys.

An operator's key acts for the project that the header `OpenAI-Project` names. Valid keys are never delayed, even
if the same address has also sent wrong keys.
"""

import asyncio
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from starlette.datastructures import Headers
from starlette.types import Scope

from adapters.errors import Hint, NotFound
from server.access.access import Access
from server.access.principal import ANONYMOUS, Principal
from server.api.near_names import unknown_path
from server.api.routes import NOWHERE, Requirements, Resource, Routes
from server.errors import Forbidden, TryAgain, Unauthorized
from server.metrics.metrics import HttpMetrics

MAX_SECRETS = 10
"""Number of different wrong keys that an address may send in a minute without being delayed."""
MAX_WRONG = 600
"""Number of wrong keys, counting repetitions, that an address may send in a minute without being delayed."""
DELAY_SECONDS = 1.0
_WINDOW_SECONDS = 60.0
_MAX_ADDRESSES = 4096
_MAX_DELAYED = 64  # requests at a time, since each of them keeps a connection open


class TooManyGuesses(TryAgain):
    """The error for a request with a wrong key if too many such requests are being delayed already."""


@dataclass
class _Wrong:
    since: float
    count: int = 0
    secrets: set[int] = field(default_factory=set)


class Guesses:
    """Counts wrong keys per address and minute, for the _MAX_ADDRESSES addresses seen most recently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, _Wrong] = OrderedDict()
        self._num_delayed = 0

    def __len__(self) -> int:
        return len(self._wrong)

    async def wrong(self, address: str, secret: str) -> None:
        """Count a wrong key, and delay the request if its address has sent too many wrong keys.

        Raise TooManyGuesses instead of the delay if too many requests are being delayed already.
        """
        now = self._clock()
        key = network_of(address)
        found = self._wrong.get(key)
        if found is None or now - found.since >= _WINDOW_SECONDS:
            found = self._wrong[key] = _Wrong(now)
        self._wrong.move_to_end(key)
        if len(self._wrong) > _MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        found.count += 1
        if len(found.secrets) <= MAX_SECRETS:
            found.secrets.add(hash(secret))
        if len(found.secrets) <= MAX_SECRETS and found.count <= MAX_WRONG:
            return
        if self._num_delayed >= _MAX_DELAYED:
            left = found.since + _WINDOW_SECONDS - now
            raise TooManyGuesses("too many wrong keys from this address", retry_after=left, reason="wrong_keys")
        self._num_delayed += 1
        try:
            await asyncio.sleep(DELAY_SECONDS)
        finally:
            self._num_delayed -= 1


def network_of(address: str) -> str:
    """Return the part of an address that identifies a client: for IPv6 the first 64 bits, for IPv4 all of it."""
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return address if found.ipv4_mapped or found.is_loopback else f"{int(found) >> 64:x}"


PROJECT_HEADER = "OpenAI-Project"
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""HTTP methods that change nothing. They don't count towards a rate limit, except downloads and long lists."""
_PRINCIPAL, _END, _SENDER = "principal", "end_of_key", "sender"
_SEND_KEY = Hint("send_key", "Authorization: Bearer <key>")
_REPLACE_KEY = Hint("replace_key", _SEND_KEY.text)
_OMIT_PROJECT = Hint("omit_project", "leave out OpenAI-Project")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def principal_of(scope: Scope) -> Principal | None:
    """Return the request's principal, or None if its route needs no key."""
    return cast("Principal | None", scope.get("state", {}).get(_PRINCIPAL))


@dataclass(frozen=True)
class Sender:
    """Who sent a request, whether it was admitted or not.

    `who` is as in `server.access.audit.Entry`. `project` is empty if the key is missing or unknown.
    """

    who: str = ANONYMOUS
    project: str = ""
    has_key: bool = False  # a key that exists, though it may be revoked or expired


def sender_of(scope: Scope) -> Sender:
    """Return the request's sender."""
    return cast("Sender", scope.get("state", {}).get(_SENDER, Sender()))


def is_exempt(principal: Principal, needs: Requirements | None) -> bool:
    """Return whether a request doesn't count towards limits: an operator's to a route for administration.

    Otherwise a manager of the operator's project could lock the operator out, by a low limit.
    """
    return principal.is_operator and needs is not None and needs.administers


def end_of_key(scope: Scope) -> "asyncio.Future[None] | None":
    """Return a future, done once the request's key is revoked or expires, or None if the route needs no key."""
    end = scope.get("state", {}).get(_END)
    return None if end is None else cast("Callable[[], asyncio.Future[None]]", end)()


class Authentication:
    """The checks of a request's key, scopes, project and rate limit."""

    def __init__(self, access: Access, metrics: HttpMetrics, routes: Routes) -> None:
        self._access = access
        self._metrics = metrics
        self._routes = routes
        self._guesses = Guesses()

    async def admit(self, scope: Scope, resource: Resource) -> None:
        """Check the request's key, store its principal in the scope, and count the request towards rate limits.

        Raise Unauthorized, Forbidden or RateLimited if the request is refused, and NotFound if there is no such
        path or project.
        """
        state = scope.setdefault("state", {})
        principal = await self._principal(scope, resource, state)
        state.update({_PRINCIPAL: principal, _END: partial(self._access.ring.end_of, principal)})

    async def _principal(self, scope: Scope, resource: Resource, state: dict[str, object]) -> Principal:
        """Check a request as `admit` does, and return its principal. `state` gets the sender in any case."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if _CONTROL.search(path):  # without this check, a route would also match its path with a line feed added
            raise self._no_such_path(path)
        secret = _secret(headers)
        is_scrape = resource.all.watcher == "scraper"  # /metrics is needed most while the database is away
        principal = await self._access.ring.principal(secret, at_any_age=is_scrape)
        if principal is None:
            self._metrics.refused(self._access.ring.fault_of(secret))
            if secret is not None:
                key = self._access.ring.key_of(secret)
                state[_SENDER] = Sender("unknown") if key is None else Sender(key.id, key.project, has_key=True)
                await self._guesses.wrong(scope["client"][0] if scope.get("client") else "", secret)
            hint = _SEND_KEY if secret is None else _REPLACE_KEY
            raise Unauthorized(f"send a valid key: {hint}", hint=hint)
        has_key = principal.key_id != ANONYMOUS
        state[_SENDER] = Sender(principal.key_id, principal.project if has_key else "", has_key)
        if resource is NOWHERE and not principal.is_operator:
            raise self._no_such_path(path)
        scopes = resource.methods.get(method, resource.all).scopes or ()
        if not principal.may(scopes):
            needed = " or ".join(sorted(scopes))
            has = ", ".join(sorted(principal.scopes))
            if principal.key_id == ANONYMOUS:
                raise Forbidden(
                    f"send a key with the scope {needed}: clients without a key have {has}", reason="scope"
                )
            raise Forbidden(f"this key lacks the scope {needed}: it has {has}", reason="scope")
        principal = self._at_work_in(headers.get(PROJECT_HEADER), principal)
        needs = resource.methods.get(method)
        if is_exempt(principal, needs):
            return principal
        if method not in FREE_METHODS or (needs is not None and needs.counts):
            await self._access.rates.take(principal, "requests")
        elif needs is not None and needs.is_list:
            await self._access.rates.take(principal, "requests", 0)
        return principal

    def _no_such_path(self, path: str) -> NotFound:
        return NotFound(unknown_path(path, self._routes.static_paths))

    def _at_work_in(self, project: str | None, principal: Principal) -> Principal:
        if project is None or (project == principal.project and not principal.sees_all):
            return principal
        if not principal.is_operator:
            whose = "clients without a key work in" if principal.key_id == ANONYMOUS else "this key belongs to"
            raise Forbidden(
                f"{whose} the project {principal.project}: {_OMIT_PROJECT}", hint=_OMIT_PROJECT, reason="scope"
            )
        found = self._access.ring.within(principal, project)
        if found is None and principal.key_id != ANONYMOUS:
            raise NotFound("there is no project of the name that OpenAI-Project gives")
        return found or principal  # OpenAI's clients send the header if OPENAI_PROJECT_ID is set


def _secret(headers: Headers) -> str | None:
    """Return the request's key, None if the key is missing or empty, or \"\" if the scheme isn't Bearer.

    Also return \"\" if there are several: a proxy in front of the server may have read another one.
    """
    given = headers.getlist("authorization")
    if len(given) != 1:
        return "" if given else None
    scheme, _, secret = given[0].partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else ""
