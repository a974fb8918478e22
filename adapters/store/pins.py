"""Which bytes this process uses, and which of those go once it doesn't any more.

Event loops pin, so nothing here waits for a disk or a database. Nor does a pin wait for a discard of the same
bytes: they may go just after they were pinned, but not while a name means them. For whoever removes them asks for
names first, and then here, and nobody publishes the bytes in between. Who pins them before that keeps them; who
pins them later finds none of their names any more, and looks *after* having pinned (`adapters.library`).
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable

InUse = Callable[[str], bool]


class Pins:
    """Of one store's digests. Thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards both, for a moment: no call to elsewhere is made under it
        self._counts: Counter[str] = Counter()
        self._doomed: dict[str, InUse] = {}

    def __contains__(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._counts

    def add(self, digests: Iterable[str]) -> None:
        """Pin each, once more where it is."""
        with self._mutex:
            self._counts.update(digests)

    def remove(self, digests: Iterable[str]) -> dict[str, InUse]:
        """Take back one `add` of each; those that were doomed and aren't pinned any more, to be discarded now."""
        freed = {}
        with self._mutex:
            for digest in digests:
                self._counts[digest] -= 1
                assert self._counts[digest] >= 0, "unpinned more often than pinned"
                if self._counts[digest] == 0:
                    del self._counts[digest]
                    if (in_use := self._doomed.pop(digest, None)) is not None:
                        freed[digest] = in_use
        return freed

    def doom(self, digest: str, in_use: InUse) -> bool:
        """Whether it is pinned. Then the last `remove` returns it, unless `revive` comes before."""
        with self._mutex:
            if digest in self._counts:
                self._doomed[digest] = in_use
            return digest in self._counts

    def revive(self, digest: str) -> None:
        """It isn't doomed."""
        with self._mutex:
            self._doomed.pop(digest, None)
