"""Versions whose bytes are held."""

from collections.abc import Callable

from adapters.catalog.versions import Part


class Pinned:
    """Resolved parts whose bytes stay while it is held. `release` may be called more than once.

    `warnings` are what whoever uses them should know, each with the version that it is about.
    """

    def __init__(self, parts: tuple[Part, ...], release: Callable[[], None] = lambda: None) -> None:
        self.parts = parts
        self.warnings: tuple[str, ...] = ()
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let go of the bytes; those of a deleted version go when nobody holds them any more."""
        if (release := self._release) is not None:
            self._release = None
            release()
