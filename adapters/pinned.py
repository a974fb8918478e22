"""Versions whose bytes are held."""

from collections.abc import Callable
from functools import partial

from adapters.catalog.versions import Part
from adapters.store.store import AdapterStore

Removal = Callable[[], None]


class Pinned:
    """Resolved parts whose bytes stay while it is held. It may be let go of more than once.

    `warnings` are what whoever uses them should know, each with the version that it is about.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        let_go: Callable[[], Removal | None] = lambda: None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.parts = parts
        self.warnings = warnings
        self._let_go: Callable[[], Removal | None] | None = let_go

    def release(self) -> None:
        """Let go of the bytes; those of a deleted version go when nobody holds them any more.

        Raises OSError, or the database's error, where those can't go just now; nothing is held then either.
        """
        if (removal := self.let_go()) is not None:
            removal()

    def let_go(self) -> Removal | None:
        """`release` without waiting, for event loops: where bytes go now, it returns what removes them, which is
        to be called in a thread and raises likewise.
        """
        let_go, self._let_go = self._let_go, None
        return None if let_go is None else let_go()


def hold(store: AdapterStore, parts: tuple[Part, ...], warnings: tuple[str, ...] = ()) -> Pinned:
    """Hold the parts' bytes, without waiting; they are there if the names that came to them are then found."""
    digests = [part.digest for part in parts]
    store.pin(digests)
    return Pinned(parts, partial(store.let_go, digests), warnings)
