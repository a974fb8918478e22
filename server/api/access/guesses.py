"""Who guesses keys is slowed down, by address; a right key of the same address is never delayed."""

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.errors import TryAgain

MAX_SECRETS = 10
"""Different wrong keys of an address in a minute that are answered at once."""
MAX_WRONG = 600
"""Wrong keys of an address in a minute that are answered at once, also if they are one and the same."""
DELAY_SECONDS = 1.0
_WINDOW_SECONDS = 60.0
_MAX_ADDRESSES = 4096
_MAX_DELAYED = 64  # at once: each holds a connection


class TooManyGuesses(TryAgain):
    """More wrong keys than are worth a delay."""


@dataclass
class _Wrong:
    since: float
    count: int = 0
    secrets: set[int] = field(default_factory=set)


class Guesses:
    """The wrong keys of each address in its present minute; the addresses seen longest ago are forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, _Wrong] = OrderedDict()
        self._num_delayed = 0

    def __len__(self) -> int:
        return len(self._wrong)

    async def wrong(self, address: str, secret: str) -> None:
        """Count a wrong key; wait if its address sent too many. Raise TooManyGuesses if too many wait already."""
        now = self._clock()
        key = _network(address)
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
            raise TooManyGuesses("too many wrong keys from this address", retry_after=left)
        self._num_delayed += 1
        try:
            await asyncio.sleep(DELAY_SECONDS)
        finally:
            self._num_delayed -= 1


def _network(address: str) -> str:
    """Return an IPv4 address as it is, and of an IPv6 address the first 64 bits, which belong to one client."""
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return address if found.ipv4_mapped or found.is_loopback else f"{int(found) >> 64:x}"
