"""Limits on requests and tokens a minute, of a key and of all keys of its project, with OpenAI's headers.

A window of a minute begins with the first request after the previous window, so in the minute after its first
request a key gets at most its limit. Counts in memory are lost by a restart; `database_rates` counts the requests
of several servers together. Use it from one event loop.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from server.access.principal import Principal, Quota
from server.errors import RateLimited

Kind = Literal["requests", "tokens"]
KINDS: tuple[Kind, ...] = ("requests", "tokens")

SMALL_STEP = 1.0
"""Seconds by which a clock may be set back without effect."""

_LIMIT_OF: dict[Kind, Callable[[Quota], int | None]] = {
    "requests": lambda quota: quota.requests_per_minute,
    "tokens": lambda quota: quota.tokens_per_minute,
}


@dataclass(frozen=True)
class Limit:
    """A limit per minute of a key or a project."""

    kind: Kind
    whose: Literal["key", "project"]
    name: str
    most: int


@dataclass(frozen=True)
class Window:
    """The rest of a limit's current minute; `ends_at` is in seconds since 1970."""

    remaining: int
    ends_at: float

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.ends_at - time.time())


class Rates(Protocol):
    """The counts against limits in the current minute."""

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """Count `amount`, or raise RateLimited and count nothing if less is left.

        An amount of 0 is refused if more was charged than the limit.
        """

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        """Count `amount`, even if less is left."""

    def headers(self, principal: Principal) -> dict[str, str]:
        """Return `x-ratelimit-…` headers for each kind.

        If both the key and its project have a limit, the headers describe the one with less left.
        """


class MemoryRates:
    """The counts of one server. If the machine's clock is set back, all windows begin again."""

    def __init__(self) -> None:
        self._counts = MemoryStorage()
        self._windows = FixedWindowRateLimiter(self._counts)
        self._seen = time.time()

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        limits = limits_of(principal, kind)
        now = time.time()
        if now < self._seen - SMALL_STEP:  # otherwise windows would last longer by that step
            self._counts.reset()
        self._seen = now
        for limit in sorted(limits, key=lambda limit: amount <= limit.most):  # amounts above a limit first
            if not self._windows.test(*_item(limit), cost=amount):
                raise refusal(limit, amount, self._window(limit), self.headers(principal))
        for limit in limits:
            self._windows.hit(*_item(limit), cost=amount)

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        for limit in limits_of(principal, kind):
            self._windows.hit(*_item(limit), cost=amount)

    def headers(self, principal: Principal) -> dict[str, str]:
        return headers_of(principal, self._window)

    def _window(self, limit: Limit) -> Window:
        stats = self._windows.get_window_stats(*_item(limit))
        return Window(stats.remaining, stats.reset_time)


def limits_of(principal: Principal, kind: Kind) -> list[Limit]:
    """Return the limits of the key and of its project, if they have any."""
    key, project = _LIMIT_OF[kind](principal.quota), _LIMIT_OF[kind](principal.project_quota)
    of_key = [] if key is None else [Limit(kind, "key", principal.key_id, key)]
    return of_key if project is None else [*of_key, Limit(kind, "project", principal.project, project)]


def headers_of(principal: Principal, window_of: Callable[[Limit], Window]) -> dict[str, str]:
    """Return the headers of `Rates.headers`, with each limit's window from `window_of`."""
    found: dict[str, str] = {}
    for kind in KINDS:
        if stats := [(window_of(limit), limit) for limit in limits_of(principal, kind)]:
            window, limit = min(stats, key=lambda pair: pair[0].remaining)
            found[f"x-ratelimit-limit-{kind}"] = str(limit.most)
            found[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
            left = math.ceil(window.seconds_left)
            found[f"x-ratelimit-reset-{kind}"] = f"{left // 60}m{left % 60}s" if left >= 60 else f"{left}s"
    return found


def refusal(limit: Limit, amount: int, window: Window, headers: dict[str, str]) -> RateLimited:
    """Return the error for a request that exceeds a limit."""
    whose = f"the {limit.whose} {limit.name} has {limit.most}"
    if amount <= limit.most:
        message = f"{whose} {limit.kind} a minute, and too few are left of this one"
    else:
        unit = "requests" if limit.kind == "requests" else "tokens, prompt and max_tokens together"
        message = f"this asks for up to {amount} {unit}, and {whose} a minute: ask for less"
        headers = headers | {"x-should-retry": "false"}  # else OpenAI's client retries twice, after a minute
    return RateLimited(message, retry_after=window.seconds_left, headers=headers)


def _item(limit: Limit) -> tuple[RateLimitItemPerMinute, str, str, str]:
    return RateLimitItemPerMinute(limit.most), limit.kind, limit.whose, limit.name
