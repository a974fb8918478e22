"""Usage is stored by itself, twice a second."""

import asyncio
import logging

from anyio import to_thread

from server.access.access import Access
from server.access.usage import FLUSH_SECONDS

log = logging.getLogger("smolora.access")


async def keep_books(access: Access, interval: float = FLUSH_SECONDS) -> None:
    """Store what was counted, again each time so many seconds have passed; until cancelled."""
    while True:
        await asyncio.sleep(interval)
        await keep_now(access)


async def keep_now(access: Access) -> None:
    """Store it once. What the disk or the database doesn't take now is kept for the next time."""
    used = access.ring.take_used()
    try:
        await to_thread.run_sync(access.keep, used)
    except Exception as error:
        access.ring.give_back(used)
        log.error("can't store usage just now: %s", type(error).__name__)
