"""The adapters for one base: the catalog's names and the store's bytes together.

The catalog says which bytes a name means, and the store has the bytes. Other processes may delete a name at any
time, and its bytes soon after. A pin keeps bytes from being removed (see `AdapterStore.pin`), but it may come too
late. So the library looks up a name, pins its bytes, and looks it up again: if the name still means the same
bytes, they stay until they are unpinned.

All methods may block on disk, except those that say otherwise: call them in a thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from adapters import recorded
from adapters.catalog.catalog import Adapter, Catalog, Kind, Version
from adapters.catalog.recovery import Recovered
from adapters.catalog.versions import Part, VersionLimits, gather
from adapters.errors import Conflict, InvalidInput
from adapters.expression import Term
from adapters.lora import BaseShape, LoraWeights, ModuleKey
from adapters.names import BASE, Viewpoint, alias_fault, name_fault, split_key
from adapters.peft import files as peft_format
from adapters.sql import FAILURES
from adapters.store.store import AdapterStore

NUM_VERSIONS = 100
"""The most versions with which `Library.get` describes an adapter by default."""

Removal = Callable[[], None]

_MAX_REMEMBERED = 10_000  # results of comparing a version with the base
_SHOWN = 200  # characters of a base's name, which may come from a client


class Pinned:
    """The parts that an expression means. Their bytes are pinned: they stay in the store until `release`.

    `warnings` are about the parts, for the user: each begins with the version that it is about.
    """

    def __init__(
        self, parts: tuple[Part, ...] = (), warnings: tuple[str, ...] = (), store: AdapterStore | None = None
    ) -> None:
        """Pin the parts' bytes, without blocking.

        They exist until `release` if a look-up after this call finds that the parts' names still mean them.
        """
        self.parts = parts
        self.warnings = warnings
        self._store = store
        if store is not None:
            store.pin(self._digests)

    def release(self) -> None:
        """Unpin the bytes. A second call is a no-op.

        Bytes of deleted versions are removed when nothing pins them any more.

        Raise OSError or the database's error if the removal fails; the bytes are unpinned nevertheless.
        """
        if (removal := self.unpin()) is not None:
            removal()

    def unpin(self) -> Removal | None:
        """Unpin the bytes without blocking.

        Return a function that removes the bytes of deleted versions, to call in a thread, or None if nothing is to
        be removed.
        """
        store, self._store = self._store, None
        return None if store is None else store.let_go(self._digests)

    @property
    def _digests(self) -> list[str]:
        return [part.digest for part in self.parts]


def _never(digest: str, project: str | None = None) -> bool:
    return False


class Library:
    """The adapters for one base, as one project sees them.

    `is_parent(digest, project)` returns whether an unfinished job of the project (None: of any project) uses this
    adapter.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: AdapterStore,
        shape: BaseShape,
        base_name: str,
        is_parent: Callable[[str, str | None], bool] = _never,
        base_digest: str | None = None,
    ) -> None:
        self.catalog = catalog
        self.store = store
        self.shape = shape
        self._is_parent = is_parent
        self._base = ServedBase(base_name, base_digest)
        # of all projects' views: versions never change
        self._warnings_if_usable = lru_cache(_MAX_REMEMBERED)(self._compare_with_base)

    @property
    def base_name(self) -> str:
        return self._base.name

    def of(self, viewpoint: Viewpoint, limits: VersionLimits | None = None) -> "Library":
        """Return the library as another project sees it. `limits` are as in `Catalog.of`."""
        view = copy(self)
        view.catalog = self.catalog.of(viewpoint, limits)
        return view

    def pin(self, terms: Sequence[Term], field: str = "adapter") -> Pinned:
        """Resolve the terms and pin their bytes, for use with the base. A composition means its parts.

        Raise NotFound, naming the missing terms; InvalidInput on `field` if there are too many parts or a weight
        is too large; Conflict, naming the versions that don't fit the base's shapes; or CorruptAdapter if a part's
        files are found to be damaged or missing.
        """
        pinned = self._pin(terms, field)
        try:
            pinned.warnings = self._check_usable(pinned.parts)
        except BaseException:
            pinned.release()
            raise
        return pinned

    def _pin(self, terms: Sequence[Term], field: str = "adapter") -> Pinned:
        """Pin the terms' bytes, whether they fit the base or not."""
        parts = self.catalog.resolve(terms, field)
        while True:
            pinned = Pinned(parts, store=self.store)
            try:
                parts = self.catalog.resolve(terms, field)
            except BaseException:
                pinned.release()
                raise
            if parts == pinned.parts:
                return pinned
            pinned.release()

    def check_name(self, name: str, kind: Kind = "adapter") -> None:
        """Raise InvalidInput if `name` is invalid, or Conflict if it is the name of something of another kind."""
        if fault := name_fault(BASE if name == self.base_name else name):
            raise InvalidInput.of("name", fault)
        self.catalog.check_kind(name, kind)

    def publish(
        self, name: str, config_json: bytes, weights: Path, source: Mapping[str, object] | None = None
    ) -> Version:
        """Check PEFT's two files and publish them as the name's next version. The files may be deleted afterwards.

        `source` is stored in the version's configuration. Raise InvalidAdapter, naming every key at fault, or
        Conflict if a composition has the name.
        """
        self.check_name(name)
        adapter = peft_format.read(config_json, weights, self.shape)
        digest = adapter.weights.digest
        self.store.pin([digest])  # a concurrent discard waits for the unpin, then asks the catalog again
        try:
            original = {peft_format.CONFIG_NAME: config_json}
            with self.store.publishing(adapter, self._is_wanted, original) as num_bytes:
                version = self.catalog.publish(
                    name,
                    digest=digest,
                    bytes=num_bytes,
                    rank=adapter.config.rank,
                    alpha=adapter.config.alpha,
                    target_modules=adapter.weights.target_modules,
                    parameters=adapter.weights.num_parameters,
                    base_model=adapter.base_model,
                    warnings=self._base.upload_warnings(adapter.base_model),
                    base_digest=self._base.digest,
                    config={**recorded.of_upload(adapter.config, config_json), **(source or {})},
                )
        finally:
            with suppress(*FAILURES):  # the client must learn whether the version was published
                self.store.unpin([digest])
        version = self._with_warnings(version)
        with suppress(*FAILURES):  # it is published, with or without this warning
            version = self._with_twin(version)
        return version

    def compose(
        self,
        name: str,
        terms: Sequence[Term],
        field: str = "expression",
        measured: Callable[[Sequence[Part]], Mapping[str, object] | None] = lambda parts: None,
    ) -> tuple[Version, bool]:
        """Publish a composition as the name's next version, with its terms pinned to versions.

        `measured` returns the results of an evaluation of the parts, to store with a new version, or None. It may
        raise an error, and then nothing is published.
        Return the version, and whether it is new: if the latest version has the same parts and weights, nothing is
        published. Raise errors as `pin` and `Catalog.compose` do.
        """
        self.check_name(name, "composition")
        pinned = self.pin(terms, field)
        try:
            parts = gather(pinned.parts)
            versions = [Term(part.name, part.version, weight=part.weight) for part in parts]
            version, is_new = self.catalog.compose(name, versions, field, measured(parts))
            version = self._with_warnings(version)
            if not is_new:
                unchanged = "it is the same already: there is no new version"
                version = replace(version, warnings=(*version.warnings, unchanged))
            return version, is_new
        finally:
            pinned.release()

    def point(self, name: str, alias: str, version: int) -> Adapter:
        """Make the alias, or `latest`, mean this version.

        Raise NotFound if the version doesn't exist, or InvalidInput on `alias` if the alias is invalid.
        """
        if fault := alias_fault(alias):
            raise InvalidInput.of("alias", fault)
        self.catalog.point(name, alias, version)
        return self.get(name)

    def unpoint(self, name: str, alias: str) -> None:
        """Remove the alias. Raise NotFound if it doesn't exist, or Conflict if it is `latest`."""
        self.catalog.unpoint(name, alias)

    def set_visibility(self, name: str, is_public: bool) -> Adapter:
        """Let other projects use the adapter if `is_public`, else no longer let them.

        Raise NotFound, or Conflict if a public composition would have a private part.
        """
        self.catalog.set_visibility(name, is_public)
        return self.get(name)

    def page(
        self,
        name: str | None,
        limit: int,
        after: str | None,
        *,
        contains: str | None = None,
        public: bool = False,
        num_versions: int | None = None,
        max_versions: int | None = None,
    ) -> tuple[list[Adapter], str | None]:
        """Return one page of the adapters that `Catalog.list` returns, and the `after` for the next page.

        On the last page, `after` is None.
        """
        found = self.catalog.list(
            name,
            limit,
            after,
            contains=contains,
            public=public,
            num_versions=num_versions,
            max_versions=max_versions,
        )
        last = found[-1].name if len(found) == limit and name is None else None
        if last is not None and not self.catalog.has_after(last, contains=contains, public=public):
            last = None
        return list(map(self._with_all_warnings, found)), last

    def get(self, name: str, num_versions: int = NUM_VERSIONS, below: int | None = None) -> Adapter:
        """Return the adapter with versions as `Catalog.list` does. Raise NotFound if it doesn't exist."""
        return self._with_all_warnings(self.catalog.get(name, num_versions, below))

    def version(self, name: str, version: int) -> Version:
        """Return one version. Raise NotFound if it doesn't exist."""
        return self._with_warnings(self.catalog.version(name, version))

    def named(self, terms: Sequence[Term], field: str = "adapter") -> list[Version]:
        """Return the versions that the terms mean now, whether they fit the base or not.

        Raise NotFound and InvalidInput as `pin` does.
        """
        return [self.version(part.name, part.version) for part in self.catalog.resolve(terms, field)]

    def open(self, name: str, version: int) -> dict[str, BinaryIO]:
        """Open the version's two PEFT files, with its own configuration.

        The caller closes the files. They stay readable if the version is deleted. Raise NotFound if the version
        doesn't exist, CorruptAdapter if its files are damaged or missing, or Conflict if it is a composition.
        """
        if (found := self.catalog.version(name, version)).parts:
            raise Conflict(f"{name}@{version} is a composition: its parts have the weights, download those")
        pinned = self._pin([Term(name, version)])
        try:
            return recorded.own_files(found, self.store)
        finally:
            pinned.release()

    def keep(self, adapter: peft_format.PeftAdapter) -> int:
        """Store the adapter, and return its size in bytes.

        The next sweep removes the bytes unless a version names them.
        """
        return self.store.put(adapter)

    def publishing(self, adapter: peft_format.PeftAdapter) -> AbstractContextManager[int]:
        """Store an adapter's bytes, and yield their number. The caller's block must commit a version with them.

        If the block fails, remove the bytes, unless another version or a job needs them.
        """
        return self.store.publishing(adapter, self._is_wanted)

    def is_of_base(self, version: Version) -> bool:
        """Return whether a version was made on the served base, and its configuration says so."""
        return self._base.is_named_by(version)

    def discard(self, *digests: str) -> None:
        """Remove bytes that no version and no job needs."""
        for digest in digests:
            self.store.discard(digest, self._is_wanted)

    def load(self, digest: str) -> LoraWeights:
        """Return the weights of pinned bytes, which may be for another base.

        Raise CorruptAdapter if the bytes are missing or inconsistent.
        """
        return self.store.load(digest)

    def verify(self, digest: str) -> None:
        """Read all bytes. Raise CorruptAdapter unless they have the digest."""
        self.store.verify(digest)

    def read(self, digest: str) -> peft_format.PeftAdapter:
        """Return the adapter of a pinned part, with the configuration of the first version that had its bytes.

        Raise CorruptAdapter if the bytes are missing or damaged, or don't fit the base.
        """
        return self.store.read(digest, self.shape)

    def ranks(self, digest: str) -> dict[ModuleKey, int]:
        """Return the rank of each module of a pinned part, without reading its weights.

        Raise CorruptAdapter if its configuration is missing or damaged, or doesn't fit the base.
        """
        return self.store.ranks(digest, self.shape)

    def delete(self, name: str, force: bool = False) -> None:
        """Delete all versions of the name. New requests don't find it; running requests keep its bytes.

        Raise NotFound, or Conflict if an alias (unless `force`), a composition or a training job needs a version.
        """
        self._prepare_to_delete(name, self.catalog.get(name).versions)
        self._discard_if_possible(self.catalog.delete(name, force))

    def delete_version(self, name: str, version: int, force: bool = False) -> None:
        """Delete one version, as `delete` does."""
        self._prepare_to_delete(name, [self.catalog.version(name, version)])
        self._discard_if_possible(self.catalog.delete_version(name, version, force))

    def recover(self, is_known: Callable[[str], bool] = _never) -> Recovered:
        """Repair what killed processes left, on the disk and in the catalog, and return what was repaired.

        If other machines may be writing the catalog, only the disk is repaired; use `doctor --rebuild` for the
        catalog. `is_known(job_id)` returns whether the database has the job.
        """
        found = Recovered() if self.store.is_in_bucket else self.catalog.recover(self.store.is_whole, is_known)
        self.sweep()
        return found

    def sweep(self) -> None:
        """Remove all bytes that no version and no job needs."""
        self.store.sweep(self._is_wanted)

    def _check_usable(self, parts: Iterable[Part]) -> tuple[str, ...]:
        """Return the warnings of all parts. The parts' bytes must be pinned.

        Raise Conflict if a part's shapes don't fit the base, NotFound if a version is gone, or CorruptAdapter if
        files are found to be damaged or missing.
        """
        viewpoint = self.catalog.viewpoint
        found: dict[str, tuple[str, ...] | None] = {}
        for part in parts:
            warnings = self._warnings_if_usable(viewpoint, part.name, part.version, part.digest)
            found[f"{part.name}@{part.version}"] = warnings
        if misfits := [reference for reference, warnings in found.items() if warnings is None]:
            raise Conflict(f"made for a base of other shapes than {self.base_name}: {', '.join(misfits)}")
        return tuple(f"{reference}: {text}" for reference, warnings in found.items() for text in warnings or ())

    def _compare_with_base(
        self, viewpoint: Viewpoint, name: str, number: int, digest: str
    ) -> tuple[str, ...] | None:
        """Return the version's warnings, or None if its shapes don't fit the base."""
        version = self.catalog.of(viewpoint).version(name, number)
        same_base = version.base_digest is not None and version.base_digest == self._base.digest
        return self._base.warnings(version) if same_base or self.store.fits(digest, self.shape) else None

    def _discard_if_possible(self, digests: Iterable[str]) -> None:
        """Discard deleted versions' bytes. If the disk or the database fails, the next sweep discards them."""
        with suppress(*FAILURES):
            self.discard(*digests)

    def _prepare_to_delete(self, name: str, versions: Sequence[Version]) -> None:
        self.catalog.own_key(name)  # called first, so that other projects don't learn which job needs the version
        needed = [f"{version.name}@{version.version}" for version in versions if self._is_needed(version)]
        if needed:
            raise Conflict(f"a job needs {', '.join(needed)}: cancel it, or wait for its end")
        self.store.doubt(version.digest for version in versions if not version.parts)

    def _is_needed(self, version: Version) -> bool:
        """Return whether a job of its project needs the version. Jobs of other projects need only its bytes."""
        return self._is_parent(version.digest, split_key(self.catalog.viewpoint.key(version.name))[0])

    def _is_wanted(self, digest: str) -> bool:
        # a job may have been submitted after `_is_needed` was asked: its parent's bytes stay
        return self.catalog.in_use(digest) or self._is_parent(digest, None)

    def _with_twin(self, version: Version) -> Version:
        """Return the version, with a warning added if an earlier version of its name has the same weights.

        Otherwise return `version` unchanged.
        """
        twin = self.catalog.twin(version)
        warning = f"its weights are those of {version.name}@{twin}: stored as a new version all the same"
        return version if twin is None else replace(version, warnings=(*version.warnings, warning))

    def _with_all_warnings(self, adapter: Adapter) -> Adapter:
        return replace(adapter, versions=tuple(map(self._with_warnings, adapter.versions)))

    def _with_warnings(self, version: Version) -> Version:
        """Return the version with its warnings for the served base."""
        warnings = self._base.warnings(version)
        return version if warnings == version.warnings else replace(version, warnings=warnings)


@dataclass(frozen=True)
class ServedBase:
    """The served base. `warnings` compares it with the base on which a version was made.

    An adapter's bytes show whether its shapes fit a base, but not on which base it was trained. So every version
    records the digest of its base, and an upload also records the name that its file gives for the base. If
    `digest` is None, the served base's digest is unknown, and no digest is compared with it.
    """

    name: str
    digest: str | None = None

    def upload_warnings(self, base_model: str | None) -> tuple[str, ...]:
        """Return the warnings to store with an upload whose config names `base_model`.

        The warnings stay true whichever base is served later.
        """
        if not base_model:
            return ("its config doesn't say which base it was trained on",)
        if not self._is_named(base_model):
            return (f"its config names another base, {base_model[:_SHOWN]}; it was uploaded for {self.name}",)
        return ()

    def warnings(self, version: Version) -> tuple[str, ...]:
        """Return the version's stored warnings, and one more if it wasn't made on the served base.

        Bases are compared by digest. A version without a base digest, such as a blend of parts from several bases,
        is compared by the base's name, unless there are stored warnings.
        """
        made_on = version.base_digest
        if made_on is not None:
            if self.digest is None or self.digest == made_on:
                return version.warnings
            named = "" if version.base_model is None else f"{version.base_model[:_SHOWN]}, "
            other = f"another base ({named}digest {made_on[:12]})"
            return (*version.warnings, f"it was made on {other} than {self.name} (digest {self.digest[:12]})")
        if version.warnings or not version.base_model or self._is_named(version.base_model):
            return version.warnings
        return (f"it was made on another base, {version.base_model[:_SHOWN]}, than {self.name}",)

    def is_named_by(self, version: Version) -> bool:
        """Return whether the version was made on this base, and the name that it gives for its base means it."""
        is_same = version.base_digest is not None and version.base_digest == self.digest
        return is_same and version.base_model is not None and self._is_named(version.base_model)

    def _is_named(self, name: str) -> bool:
        """Return whether `name`, a path or hub id that a file gives for its base, seems to mean this base."""
        return name.rstrip("/").rsplit("/", 1)[-1].lower() == self.name.lower()
