"""Whether adapters were made on the base that is served, as far as their records say.

Bytes fit or they don't; whose weights they were trained beside shows in no byte. So the digest of that base is
kept with every version, and a name that an uploaded file gives for it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from adapters.catalog.versions import Part, Version
from adapters.errors import Conflict

_MAX_FITS = 10_000
_SHOWN = 200  # characters of a base's name, which may be the client's


@dataclass(frozen=True)
class ServedBase:
    """The base that is served. `digest` is that of its weights; None: unknown, and nothing is compared with it."""

    name: str
    digest: str | None = None

    def goes_by(self, name: str) -> bool:
        """Whether a file that gives this name, a path or a hub id, seems to mean this base."""
        return name.rstrip("/").rsplit("/", 1)[-1].lower() == self.name.lower()

    def upload_warnings(self, base_model: str | None) -> tuple[str, ...]:
        """What to keep with an upload that gives `base_model` as its base. True whatever is served later."""
        if not base_model:
            return ("its config doesn't say which base it was trained on",)
        if not self.goes_by(base_model):
            return (f"its config names another base, {base_model[:_SHOWN]}; it was uploaded for {self.name}",)
        return ()

    def warnings(self, version: Version) -> tuple[str, ...]:
        """What to tell of a version beside this base: all that was kept, whether it was made on another one, and
        whether it is worse than its own.
        """
        return (*self._beside(version), *_quality(version))

    def _beside(self, version: Version) -> tuple[str, ...]:
        """Versions from before digests were kept, and blends of parts from several bases, are told by name."""
        made_on = version.base_digest
        if made_on is not None:
            if self.digest is None or self.digest == made_on:
                return version.warnings
            named = "" if version.base_model is None else f"{version.base_model[:_SHOWN]}, "
            other = f"another base ({named}digest {made_on[:12]})"
            return (*version.warnings, f"it was made on {other} than {self.name} (digest {self.digest[:12]})")
        if version.warnings or not version.base_model or self.goes_by(version.base_model):
            return version.warnings
        return (f"it was made on another base, {version.base_model[:_SHOWN]}, than {self.name}",)


def _quality(version: Version) -> tuple[str, ...]:
    if not version.is_worse_than_base:
        return ()
    tuned, base = version.metrics["eval_loss"], version.metrics["base_eval_loss"]
    return (f"its loss on held-out rows, {tuned:.4f}, is worse than that of its untouched base, {base:.4f}",)


@dataclass(frozen=True)
class _Fit:
    """How a version goes with the base: whether its shapes do, and what is to be told."""

    is_usable: bool
    warnings: tuple[str, ...]


class Fits:
    """Which versions go with the base, remembered: versions never change.

    `version` looks one up by name and number, `fits` says of a digest whether its shapes are the base's.
    """

    def __init__(
        self, base: ServedBase, version: Callable[[str, int], Version], fits: Callable[[str], bool]
    ) -> None:
        self._base = base
        self._version = version
        self._fits = fits
        self._fit = lru_cache(_MAX_FITS)(self._find)

    def check(self, parts: Iterable[Part]) -> tuple[str, ...]:
        """The warnings of all parts, whose bytes are held.

        Raises Conflict where one doesn't go with the base, NotFound, or CorruptAdapter.
        """
        fits = {f"{part.name}@{part.version}": self._fit(part.name, part.version, part.digest) for part in parts}
        if misfits := [reference for reference, fit in fits.items() if not fit.is_usable]:
            raise Conflict(f"made for a base of other shapes than {self._base.name}: {', '.join(misfits)}")
        return tuple(f"{reference}: {text}" for reference, fit in fits.items() for text in fit.warnings)

    def _find(self, name: str, version: int, digest: str) -> _Fit:
        found = self._version(name, version)
        same_base = found.base_digest is not None and found.base_digest == self._base.digest
        return _Fit(same_base or self._fits(digest), found.warnings)
