"""What adapter expressions came to, for as long as nobody commits to the database.

To resolve one is SQL in a thread, a millisecond or two of the first token, and the same answer for each request
that names the adapter. It is the same until somebody commits, which takes microseconds to ask.
"""

import logging
from collections.abc import Callable, Sequence

from anyio import CancelScope, to_thread

from adapters.catalog.versions import Part
from adapters.expression import Term
from adapters.library import Library
from adapters.pinned import Pinned, hold
from adapters.viewpoint import Viewpoint

_MOST = 4096  # expressions; with more, all are resolved anew

log = logging.getLogger("smolora.api")


class RecentPins:
    """Pins what a library pins. For one event loop."""

    def __init__(self, commits: Callable[[], int | None]) -> None:
        """`commits` moves with any commit, at once; while it says None, nothing is remembered."""
        self._commits = commits
        self._seen: int | None = None
        self._known: dict[tuple[Viewpoint, tuple[Term, ...]], tuple[tuple[Part, ...], tuple[str, ...]]] = {}

    async def pin(self, library: Library, terms: Sequence[Term], field: str) -> Pinned:
        """As `Library.pin`, which is asked where it isn't known."""
        if (seen := self._commits()) is None:
            return await to_thread.run_sync(library.pin, terms, field)
        key = (library.catalog.viewpoint, tuple(terms))
        if seen != self._seen or len(self._known) >= _MOST:
            self._seen = seen
            self._known.clear()
        if (found := self._known.get(key)) is not None:
            pinned = hold(library.store, *found)
            if self._commits() == seen:  # names go before bytes do: whoever finds them now has what it holds
                return pinned
            await let_go(pinned)
        pinned = await to_thread.run_sync(library.pin, terms, field)
        if self._commits() == seen == self._seen:
            self._known[key] = (pinned.parts, pinned.warnings)
        return pinned


async def let_go(pinned: Pinned) -> None:
    """`Pinned.release` on the event loop, for an answer that is good whatever becomes of the bytes: those that go
    do so in a thread, and those that can't just now with the next sweep.
    """
    if (removal := pinned.let_go()) is not None:
        try:
            with CancelScope(shield=True):  # it is doomed no more: nobody else would remove it
                await to_thread.run_sync(removal)
        except Exception:  # the disk, or the database
            log.exception("can't remove the bytes of a deleted version just now")
