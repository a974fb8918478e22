"""The bytes of adapters in a bucket that several machines use. Each machine's root directory is a cache.

    bytes/<digest>/<copy>/...      the files, as `adapters.storage.copies` keeps them; smolora.json is the mark
    doubts/<digest>/<token>        a process may be about to publish the digest, or to delete its last version
    tombstones/<digest>/<copy>     this copy is to be deleted, once all requests that may need it have ended

`put` writes the files into the cache, as a directory store does, and uploads them, before a version names them. If
`load` doesn't find a digest in the cache, one thread downloads it for all threads that wait. Locks and pins keep
bytes in the cache. In the bucket, where no machine knows what other machines use, doubts and tombstones serve
instead:

- A process writes a doubt before it uploads a copy, and before it deletes a version. It removes the doubt when it
  is done. If it is killed, a sweep settles the doubt after `grace`, a time longer than any request: copies that
  the catalog doesn't want get tombstones.
- A discard writes tombstones. A sweep deletes a copy whose tombstone is older than `grace`, by the bucket's clock,
  if the catalog doesn't want the digest: first the copy, then the tombstone. A request that resolved the name
  before the delete has the bytes by then.

Any process may sweep at any time, stop anywhere, and go on an hour later: a published version keeps its bytes.
This holds because the process that publishes a version checks the bucket again *after* the commit. It lists the
tombstones, then the copies, and uploads another copy if there is no whole one without a tombstone. A sweep that
asks the catalog after the commit learns that the digest is wanted. A sweep that asked before the commit deletes a
copy whose tombstone existed before the commit, and exists until the copy is gone. So the publishing process sees
that tombstone, or doesn't see the copy. The copy that it uploads then has another name, so a late sweep can't
delete it. (The exception: a process that was stopped for longer than `grace` before the commit, and is killed
before it checks again. `smolora doctor` names its version.)
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
from adapters.storage.blobs import Missing
from adapters.storage.bucket import RETRY_AFTER, Bucket
from adapters.storage.copies import Copies, Copy
from adapters.store import store
from adapters.store.store import SIDECAR_NAME, AdapterStore, InUse

GRACE = 3600.0
"""Default seconds between a tombstone and the deletion; longer if a setting allows longer requests."""
_ATTEMPTS = 4
_POLL_SECONDS = 0.02

T = TypeVar("T")

log = logging.getLogger("smolora.bytes")


class BucketAdapterStore(AdapterStore):
    """An `AdapterStore` in a bucket. Methods that need the bucket raise BytesUnavailable if it fails.

    `cache_bytes` bounds the size of the cache under `root`, except for pinned bytes. A reader waits up to
    `patience` seconds for another reader's download.
    """

    is_in_bucket = True

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
        self._deletions = _Deletions(bucket, self._copies, grace)
        self._cache_bytes = cache_bytes
        self._patience = patience

    def put(self, adapter: PeftAdapter, original: Mapping[str, bytes] | None = None) -> int:
        digest = adapter.weights.digest
        if (copy := self._deletions.live(digest)) is not None:
            self._pins.revive(digest)
            with suppress(CorruptAdapter):  # it was deleted meanwhile
                self._fill(digest)
                return copy.num_bytes
        num_bytes = super().put(adapter, original)
        self._deletions.doubt(digest)
        self._push(digest, lambda: super(BucketAdapterStore, self).put(adapter, original))
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
                    self._push(digest, lambda: super(BucketAdapterStore, self).put(adapter, original))
                self._deletions.settle(digest)
            except BytesUnavailable as error:
                log.warning(
                    "%s is published, but its copy in the bucket couldn't be checked: %s", digest[:12], error
                )

    def load(self, digest: str) -> LoraWeights:
        return self._cached(digest, super().load)

    def _read(self, digest: str, base: BaseShape) -> PeftAdapter:
        return self._cached(digest, lambda digest: super(BucketAdapterStore, self)._read(digest, base))

    def open(self, digest: str) -> dict[str, BinaryIO]:
        return self._cached(digest, super().open)

    def verify(self, digest: str) -> None:
        """Verify this machine's copy. If it is damaged, download it again, and verify the new copy."""
        try:
            super().verify(digest)
        except CorruptAdapter:
            self._drop(digest)
            super().verify(digest)

    def verify_stored(self, digest: str) -> None:
        """Verify all of the bucket's copies that `load` may use.

        Copies with tombstones count if there are no others: a sweep keeps them as long as the catalog wants them.
        """
        buried = self._deletions.buried(digest)  # before the copies: a sweep removes a copy before its tombstone
        copies = self._copies.whole(digest)
        for copy in [copy for copy in copies if copy.id not in buried] or copies:
            temporary, hold = self._temporary()
            try:
                self._fetch(copy, temporary)
            except Missing:
                raise CorruptAdapter(f"the stored adapter {digest[:12]} is incomplete") from None
            finally:
                os.close(hold)
                store.delete_folders([temporary])
        if not copies:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing")

    def upload(self, digest: str) -> None:
        """Upload this machine's copy, if the bucket has none.

        The caller must know that the local copy is complete, and keep it from being deleted meanwhile.
        """

        def put() -> int:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing")

        if self._deletions.live(digest) is None:
            self._push(digest, put)

    def digests(self) -> list[str]:
        """Return the digests that have a whole copy without a tombstone in the bucket."""
        return self._deletions.digests()

    def incomplete(self) -> list[str]:
        return [f"bytes/{copy.folder}/{copy.id}" for copy in self._deletions.forgotten()]

    def is_whole(self, digest: str) -> bool:
        """Return whether there is a whole copy without a tombstone. Otherwise, a publisher has to upload one."""
        return self._deletions.live(digest) is not None

    def is_being_published(self, digest: str) -> bool:
        """Return whether a process is publishing the bytes, on any machine.

        If that process was killed, this is true until a sweep has settled its doubt.
        """
        return self._deletions.is_doubted(digest) or super().is_being_published(digest)

    def doubt(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._deletions.doubt(digest)

    def discard(self, digest: str, in_use: InUse = store.never) -> None:
        """Discard this machine's bytes as `AdapterStore.discard` does. Write tombstones for the bucket's copies.

        A failure of the bucket is logged: the next sweep repeats the discard.
        """
        super().discard(digest, in_use)
        try:
            if not in_use(digest):
                self._deletions.bury(self._copies.of(digest))
            self._deletions.settle(digest)
        except Exception as error:  # an error of the bucket or the catalog; the caller's work is done nevertheless
            log.warning("can't discard %s now, a sweep will: %s", digest[:12], error or type(error).__name__)

    def sweep(self, in_use: InUse) -> list[str]:
        """Discard unwanted bytes on this machine and in the bucket. Return the digests deleted from the bucket."""
        super().sweep(in_use)
        return self._deletions.sweep(in_use)

    def _push(self, digest: str, put: Callable[[], int]) -> None:
        """Upload the digest's directory, which is locked meanwhile, so that no process removes it.

        If the directory was already removed, call `put` to write it again.
        """
        while (hold := store.lock_folder(self._place(digest), fcntl.LOCK_SH)) is None:
            put()
        try:
            self._copies.push(digest, self._place(digest))
        finally:
            os.close(hold)

    def _cached(self, digest: str, read: Callable[[str], T]) -> T:
        """Download the bytes into the cache if needed, and return `read(digest)`."""
        for _ in range(_ATTEMPTS - 1):
            self._fill(digest)
            with suppress(OSError, CorruptAdapter):  # another process evicted it, or it is damaged
                return read(digest)
            if store.matches_sidecar(self._place(digest)):
                self._drop(digest)
        self._fill(digest)
        return read(digest)

    def _fill(self, digest: str) -> None:
        """Download the bytes into the cache, unless it has them. Raise CorruptAdapter if no copy is intact."""
        place = self._place(digest)
        if not store.matches_sidecar(place):
            with self._alone(digest):
                if not store.matches_sidecar(place):
                    self._fetch_any(digest, place)
            self._make_room(digest)
        with suppress(OSError):
            os.utime(place)  # the time of the last use, for evictions

    def _fetch_any(self, digest: str, place: Path) -> None:
        for _ in range(_ATTEMPTS):
            copies = self._copies.whole(digest)
            if not copies:
                break
            for copy in reversed(copies):  # the newest is deleted last
                with suppress(Missing, CorruptAdapter):
                    self._publish(place, partial(self._fetch, copy))
                    return
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable")

    def _fetch(self, copy: Copy, directory: Path) -> None:
        """Download the copy. Raise Missing if it is incomplete, or CorruptAdapter if its bytes have changed."""
        self._copies.fetch(copy, directory)
        if not store.matches_sidecar(directory):
            raise Missing(f"a copy of {copy.folder[:12]} is incomplete")
        store.check_weights(directory, copy.folder, store.load_weights(directory, copy.folder))

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Exclude, on this machine, all other downloads of digests with the same first two digits."""
        shelf = self._place(digest).parent
        shelf.mkdir(exist_ok=True)
        until = time.monotonic() + self._patience
        while (hold := store.lock_folder(shelf, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            if time.monotonic() > until:
                raise BytesUnavailable(retry_after=RETRY_AFTER)
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            os.close(hold)

    def _drop(self, digest: str) -> None:
        """Remove the digest from the cache, unless it is being published."""
        store.delete_folders(self._remove(digest, store.never))

    def _make_room(self, used: str) -> None:
        """Evict the least recently used digests, except `used` and pinned ones, until `cache_bytes` suffices."""
        if self._cache_bytes is None:
            return
        entries = []
        for digest in self._here():
            with suppress(OSError):  # another process evicts it
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


class _Deletions:
    """The doubts and tombstones in one bucket, which the module's docstring describes. Thread-safe."""

    def __init__(self, bucket: Bucket, copies: Copies, grace: float) -> None:
        self._bucket = bucket
        self._doubts, self._tombstones = bucket.under("doubts"), bucket.under("tombstones")
        self._copies = copies
        self._grace = grace
        self._mutex = threading.Lock()
        self._own_doubts: dict[tuple[int, str], list[str]] = {}  # by thread and digest

    def digests(self) -> list[str]:
        """Return the digests that have a whole copy without a tombstone."""
        buried = {stored.key for stored in self._tombstones.listed()}
        return sorted({c.folder for c in self._copies.all() if c.is_whole and f"{c.folder}/{c.id}" not in buried})

    def sweep(self, in_use: Callable[[str], bool]) -> list[str]:
        """Write tombstones for unwanted copies of digests with old doubts, and delete copies with old tombstones.

        `in_use(digest)` says whether the catalog wants a digest. Return the digests of deleted copies.
        """
        now = self._bucket.now()
        for doubt in self._doubts.listed():
            if (now - doubt.modified).total_seconds() > self._grace:
                digest = doubt.key.split("/")[0]
                wanted = in_use(digest)  # if so, only incomplete copies get tombstones: nothing will use them
                self.bury(copy for copy in self._copies.of(digest) if not (wanted and copy.is_whole))
                self._doubts.delete([doubt.key])
        gone = []
        for tombstone in self._tombstones.listed():
            if (now - tombstone.modified).total_seconds() <= self._grace:
                continue
            digest, copy_id = tombstone.key.split("/")
            if in_use(digest) and self.live(digest) is None:  # its publisher is about to upload another copy
                continue
            self._copies.remove(copy for copy in self._copies.of(digest) if copy.id == copy_id)
            self._tombstones.delete([tombstone.key])
            gone.append(digest)
        return gone

    def live(self, digest: str) -> Copy | None:
        """Return a whole copy without a tombstone, or None if there is none.

        The tombstones must be listed before the copies: see the module's docstring.
        """
        buried = self.buried(digest)
        return next((copy for copy in self._copies.whole(digest) if copy.id not in buried), None)

    def is_doubted(self, digest: str) -> bool:
        """Return whether there is a doubt about the digest, by any process."""
        return bool(self._doubts.listed(f"{digest}/"))

    def forgotten(self) -> list[Copy]:
        """Return the incomplete copies without a doubt and without a tombstone: no sweep removes these."""
        found: list[Copy] = []
        for copy in self._copies.all():
            digest = copy.folder
            if copy.is_whole or self.is_doubted(digest) or copy.id in self.buried(digest):
                continue  # in this order: a sweep writes the tombstone, then it removes the doubt
            # listed again: its upload may have ended, and the doubt with it
            found += [now for now in self._copies.of(digest) if now.id == copy.id and not now.is_whole]
        return found

    def buried(self, digest: str) -> set[str]:
        """Return the ids of the digest's copies that have a tombstone."""
        return {stored.key.split("/")[1] for stored in self._tombstones.listed(f"{digest}/")}

    def bury(self, copies: Iterable[Copy]) -> None:
        """Write a tombstone for each copy."""
        for copy in copies:
            self._tombstones.put(f"{copy.folder}/{copy.id}", b"")

    def doubt(self, digest: str) -> None:
        """Write a doubt, so that a sweep checks the digest if this process is killed before `settle`."""
        key = f"{digest}/{secrets.token_hex(8)}"
        self._doubts.put(key, b"")
        with self._mutex:
            self._own_doubts.setdefault((threading.get_ident(), digest), []).append(key)

    def settle(self, digest: str) -> None:
        """Remove this thread's doubts about the digest."""
        with self._mutex:
            keys = self._own_doubts.pop((threading.get_ident(), digest), [])
        if keys:
            self._doubts.delete(keys)
