"""Versions whose bytes are held."""

from collections.abc import Callable
from functools import partial

from adapters.catalog.versions import Part
from adapters.store.store import AdapterStore


class Pinned:
    """Resolved parts whose bytes stay while it is held. `release` may be called more than once.

    `warnings` are what whoever uses them should know, each with the version that it is about.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        release: Callable[[], None] = lambda: None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.parts = parts
        self.warnings = warnings
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let go of the bytes; those of a deleted version go when nobody holds them any more."""
        if (release := self._release) is not None:
            self._release = None
            release()


def hold(store: AdapterStore, parts: tuple[Part, ...], warnings: tuple[str, ...] = ()) -> Pinned:
    """Hold the parts' bytes, which are there if the names that came to them are still found afterwards."""
    digests = [part.digest for part in parts]
    store.pin(digests)
    return Pinned(parts, partial(store.unpin, digests), warnings)
