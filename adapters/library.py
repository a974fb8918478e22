"""Versions whose bytes are held.

Adapters by name: the catalog's names and the store's bytes together. A name that is found has its bytes.

A name resolves in the catalog, its bytes lie in the store, and others may delete both in between. Names go before
bytes do, and bytes that are pinned or named again stay. So whoever still finds the name after having pinned its
bytes has them, until they let go. Everything may block on disk: call it in a thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adapters import recorded
from adapters.base_match import Fits, ServedBase
from adapters.catalog.catalog import Adapter, Catalog, Kind, Version
from adapters.catalog.recovery import Recovered
from adapters.catalog.versions import Part, gather
from adapters.errors import Conflict, InvalidInput
from adapters.expression import Term
from adapters.lora import BaseShape, LoraWeights, ModuleKey
from adapters.names import BASE, Viewpoint, alias_fault, name_fault, split_key
from adapters.peft import files as peft_format
from adapters.sql import FAILURES
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


_MAX_VIEWS = 256


def _never(digest: str, project: str | None = None) -> bool:
    return False


class Library:
    """The adapters for one base, as one project sees them.

    `is_parent` says of a digest whether training, of a project or of any, goes on from it just now.
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
        self._views: dict[Viewpoint, Library] = {}
        self._fits = Fits(self._base, self.version, partial(store.fits, base=shape))

    @property
    def base_name(self) -> str:
        return self._base.name

    def of(self, viewpoint: Viewpoint) -> "Library":
        """The same as another project sees it."""
        if viewpoint == self.catalog.viewpoint:
            return self
        if (view := self._views.get(viewpoint)) is None:
            if len(self._views) >= _MAX_VIEWS:  # what they remember is found again
                self._views.clear()
            catalog, base = self.catalog.of(viewpoint), self._base
            view = Library(catalog, self.store, self.shape, base.name, self._is_parent, base.digest)
            self._views[viewpoint] = view
        return view

    def pin(self, terms: Sequence[Term], field: str = "adapter") -> Pinned:
        """Resolve the terms and hold their bytes, to be used beside the base; a composition means its parts.

        Raises NotFound, naming the terms, InvalidInput on `field` where they come to too much together, or
        Conflict, naming the versions that were made for a base of other shapes.
        """
        pinned = self._hold(terms, field)
        try:
            pinned.warnings = self._fits.check(pinned.parts)
        except BaseException:
            pinned.release()
            raise
        return pinned

    def _hold(self, terms: Sequence[Term], field: str = "adapter") -> Pinned:
        """`pin`, for whoever doesn't need them to go with the base."""
        parts = self.catalog.resolve(terms, field)
        while True:
            pinned = hold(self.store, parts)
            try:
                parts = self.catalog.resolve(terms, field)
            except BaseException:
                pinned.release()
                raise
            if parts == pinned.parts:
                return pinned
            pinned.release()

    def check_name(self, name: str, kind: Kind = "adapter") -> None:
        """Raise InvalidInput on `name` where no adapter may be called so, Conflict where another kind has it."""
        if fault := name_fault(BASE if name == self.base_name else name):
            raise InvalidInput.of("name", fault)
        self.catalog.check_kind(name, kind)

    def publish(
        self, name: str, config_json: bytes, weights: Path, source: Mapping[str, object] | None = None
    ) -> Version:
        """Check PEFT's two files and publish them as the name's next version. The files may go afterwards.

        `source` is kept in the version's configuration. Raises InvalidAdapter, naming every key at fault, or
        Conflict where a composition has the name.
        """
        self.check_name(name)
        adapter = peft_format.read(config_json, weights, self.shape)
        digest = adapter.weights.digest
        self.store.pin([digest])  # others here who delete the same bytes ask again afterwards
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
            with suppress(*FAILURES):  # what became of the version is what is told
                self.store.unpin([digest])
        told = self._told(version)
        with suppress(*FAILURES):  # it is published, whatever is said of it
            told = self._with_twin(told)
        return told

    def compose(self, name: str, terms: Sequence[Term], field: str = "expression") -> tuple[Version, bool]:
        """Publish the composition as the name's next version, pinned to what its terms mean now; and whether that
        is a new one: where the latest is the same already, nothing is published.

        Raises NotFound, naming the terms, InvalidInput on `field`, or Conflict where an adapter has the name, or
        one of the parts was made for a base of other shapes.
        """
        self.check_name(name, "composition")
        pinned = self.pin(terms, field)
        try:
            versions = [Term(part.name, part.version, weight=part.weight) for part in gather(pinned.parts)]
            version, is_new = self.catalog.compose(name, versions, field)
            told = self._told(version)
            if not is_new:
                told = replace(told, warnings=(*told.warnings, "it is the same already: there is no new version"))
            return told, is_new
        finally:
            pinned.release()

    def point(self, name: str, alias: str, version: int) -> Adapter:
        """Have the alias, or `latest`, mean that version. Raises NotFound, or InvalidInput on `alias`."""
        if fault := alias_fault(alias):
            raise InvalidInput.of("alias", fault)
        self.catalog.point(name, alias, version)
        return self.get(name)

    def unpoint(self, name: str, alias: str) -> None:
        """Remove the alias. Raises NotFound, or Conflict for `latest`."""
        self.catalog.unpoint(name, alias)

    def set_visibility(self, name: str, is_public: bool) -> Adapter:
        """Whether other projects may use the name. Raises NotFound, or Conflict: a public composition has public
        parts alone.
        """
        self.catalog.set_visibility(name, is_public)
        return self.get(name)

    def page(
        self, name: str | None, limit: int, after: str | None, *, contains: str | None = None, public: bool = False
    ) -> tuple[list[Adapter], str | None]:
        """Adapters as `Catalog.list` finds them, and the next page's `after`, if there is one."""
        found = self.catalog.list(name, limit, after, contains=contains, public=public)
        last = found[-1].name if len(found) == limit and name is None else None
        if last is not None and not self.catalog.has_after(last, contains=contains, public=public):
            last = None
        return list(map(self._all_told, found)), last

    def get(self, name: str) -> Adapter:
        """All versions of one adapter. Raises NotFound."""
        return self._all_told(self.catalog.get(name))

    def version(self, name: str, version: int) -> Version:
        """One of them. Raises NotFound."""
        return self._told(self.catalog.version(name, version))

    def named(self, terms: Sequence[Term], field: str = "adapter") -> list[Version]:
        """The versions that an expression means now, whether they go with the base or not. Raises as `pin`."""
        return [self.version(part.name, part.version) for part in self.catalog.resolve(terms, field)]

    def open(self, name: str, version: int) -> dict[str, BinaryIO]:
        """The version's two files, to read and close, with its own configuration; they outlive a delete.

        Raises NotFound, CorruptAdapter, or Conflict where it is a composition.
        """
        if (found := self.catalog.version(name, version)).parts:
            raise Conflict(f"{name}@{version} is a composition: its parts have the weights, download those")
        pinned = self._hold([Term(name, version)])
        try:
            return recorded.own_files(found, self.store)
        finally:
            pinned.release()

    def keep(self, adapter: peft_format.PeftAdapter) -> int:
        """Store its bytes, which go with the next sweep or `discard` unless a version names them; how many."""
        return self.store.put(adapter)

    def publishing(self, adapter: peft_format.PeftAdapter) -> AbstractContextManager[int]:
        """`keep`, for a block in which a version that names the bytes is committed; where it fails, they go."""
        return self.store.publishing(adapter, self._is_wanted)

    def discard(self, *digests: str) -> None:
        """Remove bytes that were kept, unless somebody wants them."""
        for digest in digests:
            self.store.discard(digest, self._is_wanted)

    def load(self, digest: str) -> LoraWeights:
        """The weights of bytes that are held, whatever base they are for. Raises CorruptAdapter."""
        return self.store.load(digest)

    def verify(self, digest: str) -> None:
        """Read all bytes. Raises CorruptAdapter unless they have the digest."""
        self.store.verify(digest)

    def read(self, digest: str) -> peft_format.PeftAdapter:
        """The adapter of a pinned part, as the first to publish its bytes had it. Raises CorruptAdapter."""
        return self.store.read(digest, self.shape)

    def ranks(self, digest: str) -> dict[ModuleKey, int]:
        """Return the rank of each module of a pinned part, without reading its weights. Raises CorruptAdapter."""
        return self.store.ranks(digest, self.shape)

    def delete(self, name: str, force: bool = False) -> None:
        """Remove the adapter: no new request finds it, running ones end on its bytes.

        Raises NotFound, or Conflict where an alias (unless `force`), a composition or a training job holds it.
        """
        self._prepare_to_delete(name, self.catalog.get(name).versions)
        self._let_go(self.catalog.delete(name, force))

    def delete_version(self, name: str, version: int, force: bool = False) -> None:
        """Remove one version, likewise."""
        self._prepare_to_delete(name, [self.catalog.version(name, version)])
        self._let_go(self.catalog.delete_version(name, version, force))

    def recover(self, is_known: Callable[[str], bool] = _never) -> Recovered:
        """Put right what killed processes left, on the disk and in the catalog; what that came to. A catalog that
        other machines may be writing stays (`doctor --rebuild`). `is_known`: does the database know this job?
        """
        found = Recovered() if self.store.is_shared else self.catalog.recover(self.store.is_whole, is_known)
        self.sweep()
        return found

    def sweep(self) -> None:
        """Remove bytes that nobody wants."""
        self.store.sweep(self._is_wanted)

    def _let_go(self, digests: Iterable[str]) -> None:
        """Of bytes whose versions are no more, whatever disk and database say: the next sweep takes what stays."""
        with suppress(*FAILURES):
            self.discard(*digests)

    def _prepare_to_delete(self, name: str, versions: Sequence[Version]) -> None:
        self.catalog.own_key(name)  # others aren't told who needs it
        held = [f"{version.name}@{version.version}" for version in versions if self._is_needed(version)]
        if held:
            raise Conflict(f"a job needs {', '.join(held)}: cancel it, or wait for its end")
        self.store.doubt(version.digest for version in versions if not version.parts)

    def _is_needed(self, version: Version) -> bool:
        """By its own project's jobs: others' keep the bytes, whatever becomes of the name."""
        return self._is_parent(version.digest, split_key(self.catalog.viewpoint.key(version.name))[0])

    def _is_wanted(self, digest: str) -> bool:
        # a job may have been taken in after it was asked whether there is one: its parent's bytes stay
        return self.catalog.in_use(digest) or self._is_parent(digest, None)

    def _with_twin(self, version: Version) -> Version:
        """Just published: with a word on the version before it that has the same weights, if one has."""
        twin = self.catalog.twin(version)
        told = f"its weights are those of {version.name}@{twin}: stored as a new version all the same"
        return version if twin is None else replace(version, warnings=(*version.warnings, told))

    def _all_told(self, adapter: Adapter) -> Adapter:
        return replace(adapter, versions=tuple(map(self._told, adapter.versions)))

    def _told(self, version: Version) -> Version:
        """With all that is to be told of it beside this base."""
        warnings = self._base.warnings(version)
        return version if warnings == version.warnings else replace(version, warnings=warnings)
