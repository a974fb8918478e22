"""Limits on requests and tokens a minute, of a key and of all keys of its project, with OpenAI's headers.

Counts are kept per window of a minute. A window begins with the first request after the previous window has ended.
The counts of `MemoryRates` are lost in a restart. Those of `database_rates` are shared by several servers. Use the
classes from one event loop.
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
    """The most requests or tokens that a key or a project may use in a minute."""

    kind: Kind
    whose: Literal["key", "project"]
    name: str
    most: int


@dataclass(frozen=True)
class Window:
    """How much of a limit remains in the current minute, which ends at `ends_at` (seconds since 1970)."""

    remaining: int
    ends_at: float

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.ends_at - time.time())


class Rates(Protocol):
    """Counts the requests and tokens of the current minute against the limits of keys and projects."""

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """Count `amount`. If less than that remains of a limit, raise RateLimited and count nothing.

        If `amount` is 0, RateLimited is raised only if `charge` has exceeded a limit.
        """

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        """Count `amount`, even if less remains of a limit."""

    def headers(self, principal: Principal) -> dict[str, str]:
        """Return the `x-ratelimit-…` headers for requests and for tokens, each only if there is a limit.

        If both the key and its project have a limit, the headers describe the limit that has less left.
        """


class MemoryRates:
    """Counts in the memory of one server. If the machine's clock is set back, all counts restart at 0."""

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
    """Return the limits for `kind` of the principal's key and project: none, one or two."""
    key, project = _LIMIT_OF[kind](principal.quota), _LIMIT_OF[kind](principal.project_quota)
    of_key = [] if key is None else [Limit(kind, "key", principal.key_id, key)]
    return of_key if project is None else [*of_key, Limit(kind, "project", principal.project, project)]


def headers_of(principal: Principal, window_of: Callable[[Limit], Window]) -> dict[str, str]:
    """Return the headers that `Rates.headers` describes. `window_of` returns a limit's current window."""
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
    return RateLimited(
        message, retry_after=window.seconds_left, headers=headers, reason=f"{limit.kind}_per_minute"
    )


def _item(limit: Limit) -> tuple[RateLimitItemPerMinute, str, str, str]:
    return RateLimitItemPerMinute(limit.most), limit.kind, limit.whose, limit.name
