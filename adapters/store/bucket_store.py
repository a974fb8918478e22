"""How adapters' bytes leave a bucket, which machines share that know nothing of each other's requests.

    bytes/<digest>/<copy>/…        see `adapters.storage.copies`
    doubts/<digest>/<token>        somebody may be about to publish the digest, or to delete its last version
    tombstones/<digest>/<copy>     this copy goes, once all requests that may want it have ended

- A doubt is written before a copy is pushed, and before a version is deleted. Done with either, its writer removes
  it; what one leaves that was killed, a sweep settles after `grace`: copies that nobody wants get tombstones.
- A discard writes tombstones. A sweep removes a copy whose tombstone is older than `grace`, by the bucket's clock,
  if the catalog doesn't want the digest: first the copy, then the tombstone. `grace` is longer than any request,
  so whoever resolved the name before the delete has the bytes by then.

Any process may sweep at any time, stop anywhere, and go on an hour later: a published version keeps its bytes. For
whoever publishes looks once more *after* the commit, for tombstones and then for a whole copy that has none, and
pushes another copy where there is none. Suppose a sweep removes a copy, having found the digest unwanted. If it
asked after the commit, it was told "wanted". If it asked before, the tombstone was there before the commit, and
stays until the copy is gone: so either the tombstone is seen, or the copy isn't. A copy that is pushed later has
another name, and what a late sweep removes is not it. (The exception is a publisher that was stopped for longer
than `grace` before the commit, and is killed before that look: doctor names its version.)

The bytes of adapters in a bucket, which many machines share; a root is one machine's cache of it.

    bytes/<digest>/<copy>/…        the files, smolora.json last: with it, the copy is there

What is put is written here as a directory store does, pushed, and only then named; what is loaded and isn't here
is fetched, by one for all who wait, and must have its digest. Holds and pins keep bytes from leaving the cache; in
the bucket, where no machine knows another's, `deletions.py` has what comes in their place.
"""

import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from adapters.errors import BytesUnavailable, CorruptAdapter
from adapters.lora import BaseShape, LoraWeights
from adapters.peft.files import PeftAdapter
from adapters.storage.bucket import RETRY_AFTER, Bucket, Missing
from adapters.storage.copies import Copies, Copy
from adapters.store import store
from adapters.store.store import SIDECAR_NAME, AdapterStore, InUse

GRACE = 3600.0
"""Seconds between a tombstone and the removal, where no setting makes requests longer than that."""


class Deletions:
    """Of the copies in one bucket. Thread-safe."""

    def __init__(self, bucket: Bucket, copies: Copies, grace: float) -> None:
        self._bucket = bucket
        self._doubts, self._tombstones = bucket.under("doubts"), bucket.under("tombstones")
        self._copies = copies
        self._grace = grace
        self._mutex = threading.Lock()
        self._own_doubts: dict[tuple[int, str], list[str]] = {}  # by thread and digest

    def digests(self) -> list[str]:
        """Of all whole copies that have no tombstone."""
        buried = {stored.key for stored in self._tombstones.listed()}
        return sorted({c.folder for c in self._copies.all() if c.is_whole and f"{c.folder}/{c.id}" not in buried})

    def sweep(self, in_use: Callable[[str], bool]) -> list[str]:
        """Settle old doubts, and remove the copies under old tombstones, but for what the catalog wants; of which
        digests something went.
        """
        now = self._bucket.now()
        for doubt in self._doubts.listed():
            if (now - doubt.modified).total_seconds() > self._grace:
                digest = doubt.key.split("/")[0]
                wanted = in_use(digest)  # then halves alone go: the rest of one may still come, but not be used
                self.bury(copy for copy in self._copies.of(digest) if not (wanted and copy.is_whole))
                self._doubts.delete([doubt.key])
        gone = []
        for tombstone in self._tombstones.listed():
            if (now - tombstone.modified).total_seconds() <= self._grace:
                continue
            digest, copy_id = tombstone.key.split("/")
            if in_use(digest) and self.live(digest) is None:  # somebody is about to push another copy
                continue
            self._copies.remove(copy for copy in self._copies.of(digest) if copy.id == copy_id)
            self._tombstones.delete([tombstone.key])
            gone.append(digest)
        return gone

    def live(self, digest: str) -> Copy | None:
        """A whole copy without a tombstone. Tombstones are looked for first: that order matters."""
        buried = self._buried(digest)
        return next((copy for copy in self._copies.whole(digest) if copy.id not in buried), None)

    def _buried(self, digest: str) -> set[str]:
        return {stored.key.split("/")[1] for stored in self._tombstones.listed(f"{digest}/")}

    def bury(self, copies: Iterable[Copy]) -> None:
        """Write a tombstone for each."""
        for copy in copies:
            self._tombstones.put(f"{copy.folder}/{copy.id}", b"")

    def doubt(self, digest: str) -> None:
        """Have sweeps look after the digest, should this thread's process not live to `settle` it."""
        key = f"{digest}/{secrets.token_hex(8)}"
        self._doubts.put(key, b"")
        with self._mutex:
            self._own_doubts.setdefault((threading.get_ident(), digest), []).append(key)

    def settle(self, digest: str) -> None:
        """Take back this thread's doubts about the digest."""
        with self._mutex:
            keys = self._own_doubts.pop((threading.get_ident(), digest), [])
        if keys:
            self._doubts.delete(keys)


_ATTEMPTS = 4
_LOOK_SECONDS = 0.02

T = TypeVar("T")

log = logging.getLogger("smolora.bytes")


def _never(digest: str) -> bool:
    return False


class SharedAdapterStore(AdapterStore):
    """As `AdapterStore`, for the machines that share a bucket. Whatever asks it raises BytesUnavailable.

    `cache_bytes` bounds what lies under `root`, but for what is pinned; a reader waits `patience` seconds for
    another's fetch.
    """

    is_shared = True

    def __init__(
        self,
        root: Path,
        bucket: Bucket,
        cache_bytes: int | None = None,
        grace: float = GRACE,
        patience: float = 30.0,
    ) -> None:
        super().__init__(root)
        self._copies = Copies(bucket.under("bytes"), SIDECAR_NAME)
        self._deletions = Deletions(bucket, self._copies, grace)
        self._cache_bytes = cache_bytes
        self._patience = patience

    def put(self, adapter: PeftAdapter, original: Mapping[str, bytes] | None = None) -> int:
        digest = adapter.weights.digest
        if (copy := self._deletions.live(digest)) is not None:
            self._pins.revive(digest)
            with suppress(CorruptAdapter):  # it went just now
                self._fill(digest)
                return copy.num_bytes
        num_bytes = super().put(adapter, original)
        self._deletions.doubt(digest)
        self._push(digest, lambda: super(SharedAdapterStore, self).put(adapter, original))
        self._make_room(digest)
        return num_bytes

    @contextmanager
    def publishing(
        self, adapter: PeftAdapter, in_use: InUse, original: Mapping[str, bytes] | None = None
    ) -> Iterator[int]:
        digest = adapter.weights.digest
        with super().publishing(adapter, in_use, original) as num_bytes:
            yield num_bytes
            try:
                if self._deletions.live(digest) is None:
                    self._push(digest, lambda: super(SharedAdapterStore, self).put(adapter, original))
                self._deletions.settle(digest)
            except BytesUnavailable as error:
                log.warning("can't look after %s just now, which is published: %s", digest[:12], error)

    def load(self, digest: str) -> LoraWeights:
        return self._cached(digest, super().load)

    def _read(self, digest: str, base: BaseShape) -> PeftAdapter:
        return self._cached(digest, lambda digest: super(SharedAdapterStore, self)._read(digest, base))

    def open(self, digest: str) -> dict[str, BinaryIO]:
        return self._cached(digest, super().open)

    def verify(self, digest: str) -> None:
        """As `AdapterStore.verify`, of this machine's copy; one that is damaged is fetched anew first."""
        try:
            super().verify(digest)
        except CorruptAdapter:
            self._drop(digest)
            super().verify(digest)

    def verify_stored(self, digest: str) -> None:
        copy = self._deletions.live(digest)
        if copy is None:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing")
        temporary, hold = self._temporary()
        try:
            self._fetch(copy, temporary)
        except Missing:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is incomplete") from None
        finally:
            os.close(hold)
            store.delete_folders([temporary])

    def share(self, digest: str) -> None:
        """Have the bucket get what lies here as it is, for who knows that it is whole and nobody discards it."""

        def put() -> int:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing")

        if self._deletions.live(digest) is None:
            self._push(digest, put)

    def digests(self) -> list[str]:
        """Of all whole copies in the bucket that have no tombstone."""
        return self._deletions.digests()

    def is_whole(self, digest: str) -> bool:
        return self._deletions.live(digest) is not None

    def doubt(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._deletions.doubt(digest)

    def discard(self, digest: str, in_use: InUse = _never) -> None:
        """As `AdapterStore.discard`, of this machine's bytes; those in the bucket get tombstones."""
        super().discard(digest, in_use)
        try:
            if not in_use(digest):
                self._deletions.bury(self._copies.of(digest))
            self._deletions.settle(digest)
        except Exception as error:  # of the bucket, or of whoever is asked: what was done before is what is told
            log.warning("can't discard %s just now, a sweep will: %s", digest[:12], error or type(error).__name__)

    def sweep(self, in_use: InUse) -> list[str]:
        """Discards what nobody wants, here and in the bucket; the digests that went there."""
        super().sweep(in_use)
        return self._deletions.sweep(in_use)

    def _push(self, digest: str, put: Callable[[], int]) -> None:
        """Upload the directory, which stays here meanwhile; `put` writes it again where it has gone."""
        while (hold := store.lock_folder(self._place(digest), fcntl.LOCK_SH)) is None:
            put()
        try:
            self._copies.push(digest, self._place(digest))
        finally:
            os.close(hold)

    def _cached(self, digest: str, read: Callable[[str], T]) -> T:
        """What `read` finds in the cache, once the bytes are there."""
        for _ in range(_ATTEMPTS - 1):
            self._fill(digest)
            with suppress(OSError, CorruptAdapter):  # another process made room, or it is damaged
                return read(digest)
            if store.matches_sidecar(self._place(digest)):
                self._drop(digest)
        self._fill(digest)
        return read(digest)

    def _fill(self, digest: str) -> None:
        """Have the bytes in the cache. Raises CorruptAdapter where no copy has them, or not with that digest."""
        place = self._place(digest)
        if not store.matches_sidecar(place):
            with self._alone(digest):
                if not store.matches_sidecar(place):
                    self._fetch_any(digest, place)
            self._make_room(digest)
        with suppress(OSError):
            os.utime(place)  # just used

    def _fetch_any(self, digest: str, place: Path) -> None:
        for _ in range(_ATTEMPTS):
            copies = self._copies.whole(digest)
            if not copies:
                break
            for copy in reversed(copies):  # the newest goes last
                with suppress(Missing, CorruptAdapter):
                    self._publish(place, partial(self._fetch, copy))
                    return
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable")

    def _fetch(self, copy: Copy, directory: Path) -> None:
        """Raises Missing where the copy isn't complete any more, CorruptAdapter where it was changed."""
        self._copies.fetch(copy, directory)
        if not store.matches_sidecar(directory):
            raise Missing(f"a copy of {copy.folder[:12]} is incomplete")
        store.check_weights(directory, copy.folder, store.load_weights(directory, copy.folder))

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """One fetch at a time, of all threads and processes of this machine (of digests that begin the same)."""
        shelf = self._place(digest).parent
        shelf.mkdir(exist_ok=True)
        until = time.monotonic() + self._patience
        while (hold := store.lock_folder(shelf, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            if time.monotonic() > until:
                raise BytesUnavailable(retry_after=RETRY_AFTER)
            time.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            os.close(hold)

    def _drop(self, digest: str) -> None:
        """Take it from the cache, but not from whoever is publishing it."""
        store.delete_folders(self._remove(digest, _never))

    def _make_room(self, used: str) -> None:
        """Drop what wasn't used for longest and isn't pinned, until the cache is within its bound."""
        if self._cache_bytes is None:
            return
        entries = []
        for digest in self._here():
            with suppress(OSError):  # another process drops it
                place = self._place(digest)
                loaded, num_packed = self.packed.facts(digest)
                last_used = max(loaded, place.stat().st_mtime)
                entries.append((last_used, digest, store.folder_size(place) + num_packed))
        excess = sum(num_bytes for _, _, num_bytes in entries) - self._cache_bytes
        for _, digest, num_bytes in sorted(entries):
            if excess <= 0:
                return
            freed = [] if digest == used else self._remove(digest, self._pins.__contains__)
            store.delete_folders(freed)
            excess -= num_bytes if freed else 0
