"""Requests and tokens a minute, of a key and of its project's keys together, as OpenAI's API tells of them.

Windows are fixed, and begin with the first request after the one before has ended: within a minute of its first
request a key has no more than its limit. In memory: a restart forgets them. For one event loop.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from server.access.principal import Principal, Quota
from server.errors import RateLimited

Kind = Literal["requests", "tokens"]
KINDS: tuple[Kind, ...] = ("requests", "tokens")

_LIMIT_OF: dict[Kind, Callable[[Quota], int | None]] = {
    "requests": lambda quota: quota.requests_per_minute,
    "tokens": lambda quota: quota.tokens_per_minute,
}


class Rates:
    """What is left of this minute to everybody who has a limit."""

    def __init__(self) -> None:
        self._windows = FixedWindowRateLimiter(MemoryStorage())

    def take(self, principal: Principal, kind: Kind, amount: int = 1) -> None:
        """Count so many, or none where that is more than is left. Raises RateLimited."""
        limits = list(_limits(principal, kind))
        for whose, name, item in limits:
            if not self._windows.test(item, kind, whose, name, cost=amount):
                raise RateLimited(
                    self._told(kind, amount, whose, name, item),
                    retry_after=self._seconds(kind, whose, name, item),
                    headers=self.headers(principal),
                )
        for whose, name, item in limits:
            self._windows.hit(item, kind, whose, name, cost=amount)

    def headers(self, principal: Principal) -> dict[str, str]:
        """Of each kind the limit of which least is left: `x-ratelimit-…`; nothing where there is no limit."""
        found: dict[str, str] = {}
        for kind in KINDS:
            stats = [
                (self._windows.get_window_stats(item, kind, whose, name), item)
                for whose, name, item in _limits(principal, kind)
            ]
            if stats:
                window, item = min(stats, key=lambda pair: pair[0].remaining)
                found[f"x-ratelimit-limit-{kind}"] = str(item.amount)
                found[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
                left = max(0, math.ceil(window.reset_time - time.time()))
                found[f"x-ratelimit-reset-{kind}"] = f"{left // 60}m{left % 60}s" if left >= 60 else f"{left}s"
        return found

    def _seconds(self, kind: Kind, whose: str, name: str, item: RateLimitItemPerMinute) -> float:
        """Until its window ends."""
        return max(0.0, self._windows.get_window_stats(item, kind, whose, name).reset_time - time.time())

    def _told(self, kind: Kind, amount: int, whose: str, name: str, item: RateLimitItemPerMinute) -> str:
        if amount > item.amount:
            asked = (
                f"{amount} {kind}" if kind == "requests" else f"{amount} tokens, prompt and max_tokens together"
            )
            return f"this asks for up to {asked}, and the {whose} {name} has {item.amount} a minute: ask for less"
        return f"the {whose} {name} has {item.amount} {kind} a minute, and too few are left of this one"


def _limits(principal: Principal, kind: Kind) -> Iterator[tuple[str, str, RateLimitItemPerMinute]]:
    """(whose, its name, how many a minute), of the key and of the project."""
    limit = _LIMIT_OF[kind]
    for whose, name, quota in (
        ("key", principal.key_id, principal.quota),
        ("project", principal.project, principal.project_quota),
    ):
        if (amount := limit(quota)) is not None:
            yield whose, name, RateLimitItemPerMinute(amount)
