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
        try:
            await to_thread.run_sync(access.keep)
        except Exception as error:  # the disk, or the database: it is all kept for the next time
            log.error("can't store usage just now: %s", type(error).__name__)
