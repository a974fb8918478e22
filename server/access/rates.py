"""Requests and tokens a minute, of a key and of its project's keys together, as OpenAI's API tells of them.

Windows are fixed, and begin with the first request after the one before has ended: within a minute of its first
request a key has no more than its limit. In memory: a restart forgets them; `shared_rates` counts those of several
servers together. For one event loop.
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
"""Seconds by which a clock may be set back without notice."""

_LIMIT_OF: dict[Kind, Callable[[Quota], int | None]] = {
    "requests": lambda quota: quota.requests_per_minute,
    "tokens": lambda quota: quota.tokens_per_minute,
}


@dataclass(frozen=True)
class Limit:
    """How many a minute a key has, or a project."""

    kind: Kind
    whose: Literal["key", "project"]
    name: str
    most: int


@dataclass(frozen=True)
class Window:
    """What is left of a limit's minute, and when that ends, in seconds since 1970."""

    remaining: int
    ends_at: float

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.ends_at - time.time())


class Rates(Protocol):
    """What is left of this minute to everybody who has a limit."""

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """Count `amount`, or nothing if it is more than is left. Raises RateLimited.

        An amount of 0 is refused if more was charged than there was.
        """

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        """Count `amount`, even if it is more than is left."""

    def headers(self, principal: Principal) -> dict[str, str]:
        """Of each kind the limit of which least is left: `x-ratelimit-…`; nothing where there is no limit."""


class OwnRates:
    """Those of one server's requests. Where the machine's clock is set back, all windows begin anew."""

    def __init__(self) -> None:
        self._counts = MemoryStorage()
        self._windows = FixedWindowRateLimiter(self._counts)
        self._seen = time.time()

    async def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """As `Rates.take`."""
        limits = limits_of(principal, kind)
        now = time.time()
        if now < self._seen - SMALL_STEP:  # by which they would end
            self._counts.reset()
        self._seen = now
        for limit in sorted(limits, key=lambda limit: amount <= limit.most):  # first what no minute has
            if not self._windows.test(*_item(limit), cost=amount):
                raise refusal(limit, amount, self._window(limit), self.headers(principal))
        for limit in limits:
            self._windows.hit(*_item(limit), cost=amount)

    async def charge(self, principal: Principal, kind: Kind, amount: int) -> None:
        """As `Rates.charge`."""
        for limit in limits_of(principal, kind):
            self._windows.hit(*_item(limit), cost=amount)

    def headers(self, principal: Principal) -> dict[str, str]:
        """As `Rates.headers`."""
        return headers_of(principal, self._window)

    def _window(self, limit: Limit) -> Window:
        stats = self._windows.get_window_stats(*_item(limit))
        return Window(stats.remaining, stats.reset_time)


def limits_of(principal: Principal, kind: Kind) -> list[Limit]:
    """Of the key and of the project, as far as they have one."""
    key, project = _LIMIT_OF[kind](principal.quota), _LIMIT_OF[kind](principal.project_quota)
    of_key = [] if key is None else [Limit(kind, "key", principal.key_id, key)]
    return of_key if project is None else [*of_key, Limit(kind, "project", principal.project, project)]


def headers_of(principal: Principal, window_of: Callable[[Limit], Window]) -> dict[str, str]:
    """As `Rates.headers`, of these windows."""
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
    """What whoever asks for so many is told."""
    whose = f"the {limit.whose} {limit.name} has {limit.most}"
    if amount <= limit.most:
        told = f"{whose} {limit.kind} a minute, and too few are left of this one"
    else:
        unit = "requests" if limit.kind == "requests" else "tokens, prompt and max_tokens together"
        told = f"this asks for up to {amount} {unit}, and {whose} a minute: ask for less"
        headers = headers | {"x-should-retry": "false"}  # OpenAI's client would wait a minute, twice
    return RateLimited(told, retry_after=window.seconds_left, headers=headers)


def _item(limit: Limit) -> tuple[RateLimitItemPerMinute, str, str, str]:
    return RateLimitItemPerMinute(limit.most), limit.kind, limit.whose, limit.name
