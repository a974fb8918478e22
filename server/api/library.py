"""Adapters by name: the catalog's names and the store's bytes as one thing that doesn't tear.

A name resolves in the catalog, its bytes lie in the store, and others may delete both in between. Names go before
bytes do, and bytes that are pinned or named again stay. So whoever still finds the name after having pinned its
bytes has them, until they let go. Everything may block on disk: call it in a thread.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from adapters import peft_format
from adapters.catalog import Adapter, Catalog, Part, Version
from adapters.errors import Conflict, InvalidInput
from adapters.expression import BASE, Term, valid_name
from adapters.lora import BaseShape
from adapters.store import AdapterStore


class Lease:
    """Resolved parts whose bytes stay while it is held. `release` may be called more than once."""

    def __init__(self, parts: tuple[Part, ...], release: Callable[[], None] = lambda: None) -> None:
        self.parts = parts
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let go of the bytes; those of a deleted version go with the last lease on them."""
        if (release := self._release) is not None:
            self._release = None
            release()


def _never(digest: str) -> bool:
    return False


class Library:
    """The adapters for one base. `is_parent` says of a digest whether training goes on from it just now."""

    def __init__(
        self,
        catalog: Catalog,
        store: AdapterStore,
        shape: BaseShape,
        base_name: str,
        is_parent: Callable[[str], bool] = _never,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self.shape = shape
        self._is_parent = is_parent
        self.base_name = base_name

    def lease(self, terms: Sequence[Term]) -> Lease:
        """Resolve the terms and hold their bytes. Raises NotFound, naming the terms."""
        parts = self._catalog.resolve(terms)
        while True:
            digests = [part.digest for part in parts]
            self._store.pin(digests)
            lease = Lease(parts, partial(self._store.unpin, digests))
            try:
                parts = self._catalog.resolve(terms)
            except BaseException:
                lease.release()
                raise
            if parts == lease.parts:
                return lease
            lease.release()

    def check_name(self, name: str) -> None:
        """Raise InvalidInput on `name` where no adapter may be called so."""
        if name in (BASE, self.base_name):
            raise InvalidInput.of("name", "is the base's own name")
        if not valid_name(name):
            raise InvalidInput.of("name", 'has 1 to 64 letters, digits, "_", "-" or ".", a letter or digit first')

    def publish(self, name: str, config_json: bytes, weights: Path) -> Version:
        """Check PEFT's two files and publish them as the name's next version. The files may go afterwards.

        Raises InvalidAdapter, naming every key at fault.
        """
        self.check_name(name)
        adapter = peft_format.read(config_json, weights, self.shape)
        digest = adapter.weights.digest
        self._store.pin([digest])  # somebody may be deleting the same bytes under another name
        try:
            return self._catalog.publish(
                name,
                digest=digest,
                bytes=self._store.put(adapter, {peft_format.CONFIG_NAME: config_json}),
                rank=adapter.config.rank,
                alpha=adapter.config.alpha,
                target_modules=adapter.weights.target_modules,
                parameters=adapter.weights.num_parameters,
                base_model=adapter.base_model,
                warnings=self._warnings(adapter.base_model),
            )
        finally:
            self._store.unpin([digest])

    def list(self, name: str | None, limit: int | None, after: str | None) -> "list[Adapter]":
        """Adapters by name, those after `after`, at most `limit`."""
        return self._catalog.list(name=name, limit=limit, after=after)

    def get(self, name: str) -> Adapter:
        """All versions of one adapter. Raises NotFound."""
        return self._catalog.get(name)

    def version(self, name: str, version: int) -> Version:
        """One of them. Raises NotFound."""
        return self._catalog.version(name, version)

    def archive(self, name: str, version: int) -> bytes:
        """A zip of the version that PEFT reads once it is unpacked. Raises NotFound, or CorruptAdapter."""
        lease = self.lease([Term(name, version)])
        try:
            return self._store.archive(lease.parts[0].digest)
        finally:
            lease.release()

    def read(self, digest: str) -> peft_format.PeftAdapter:
        """The adapter of a lease's part, with its configuration. Raises CorruptAdapter."""
        return self._store.read(digest, self.shape)

    def delete(self, name: str) -> None:
        """Remove the adapter: no new request finds it, running ones end on its bytes.

        Raises NotFound, or Conflict where an alias or a training job holds it.
        """
        self._refuse_parents(self._catalog.get(name).versions)
        self._discard(self._catalog.delete(name))

    def delete_version(self, name: str, version: int) -> None:
        """Remove one version, likewise."""
        self._refuse_parents([self._catalog.version(name, version)])
        self._discard(self._catalog.delete_version(name, version))

    def sweep(self) -> None:
        """Remove bytes that nobody wants, which killed processes left."""
        self._store.sweep(self._is_wanted)

    def _refuse_parents(self, versions: Iterable[Version]) -> None:
        held = [f"{version.name}@{version.version}" for version in versions if self._is_parent(version.digest)]
        if held:
            raise Conflict(f"a training job goes on from {', '.join(held)}: cancel it, or wait for its end")

    def _discard(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._store.discard(digest, self._is_wanted)

    def _is_wanted(self, digest: str) -> bool:
        # a job may have been taken in after it was asked whether there is one: its parent's bytes stay
        return self._catalog.in_use(digest) or self._is_parent(digest)

    def _warnings(self, base_model: str | None) -> tuple[str, ...]:
        """What a reader of the listing should know: whose weights the adapter was trained beside."""
        if not base_model:
            return ("its config doesn't say which base it was trained on",)
        if base_model.rstrip("/").rsplit("/", 1)[-1].lower() != self.base_name.lower():
            return (f"its config names another base, {base_model[:200]}; this one is {self.base_name}",)
        return ()
