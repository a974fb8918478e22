"""Refused attempts on the audit list: requests that were answered with 401 or 403, except for a used-up quota.

Anybody can send such requests, at any rate. So each client has at most one entry a minute for the same route and
status, and MAX_ENTRIES entries in all; clients without a valid key share these. The first attempt after such a
minute adds one entry a key, with the number of attempts that were left out.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from functools import partial

from anyio import to_thread

from server.access.audit import REFUSED, Audit
from server.api.authentication import Sender, network_of
from server.metrics.metrics import known_method

MAX_ENTRIES = 30
LEFT_OUT = "further attempts"
"""The target of an entry that counts what was left out."""
_SECONDS = 60.0


class Refusals:
    """Writes refused attempts to the audit list. Use it from one event loop."""

    def __init__(self, audit: Audit, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        self._since = clock()
        self._written: Counter[str] = Counter()  # this minute's entries, by client
        self._seen: set[tuple[str, str, str, int]] = set()
        self._left_out: Counter[tuple[str, str]] = Counter()  # by key and project

    async def add(self, sender: Sender, address: str, method: str, route: str, status: int) -> None:
        """Write an attempt, or only count it if there are too many.

        `route` is the path's template, or empty if the path has no route.
        """
        now = self._clock()
        if now - self._since >= _SECONDS:
            self._since = now
            self._written.clear()
            self._seen.clear()
            left_out, self._left_out = self._left_out, Counter()
            for (who, project), number in left_out.items():
                write = partial(self._audit.add, who, REFUSED, project, LEFT_OUT, {"left_out": number})
                await to_thread.run_sync(Context().run, write)  # not with this request's address and id
        target = f"{known_method(method)} {route or 'unknown path'}"
        attempt = (sender.who, "" if sender.has_key else network_of(address), target, status)
        client = sender.who if sender.has_key else ""
        if attempt in self._seen or self._written[client] >= MAX_ENTRIES:
            self._left_out[sender.who, sender.project] += 1
            return
        self._written[client] += 1
        self._seen.add(attempt)
        await to_thread.run_sync(self._audit.add, sender.who, REFUSED, sender.project, target, {"status": status})
