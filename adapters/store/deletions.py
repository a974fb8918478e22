"""How adapters' bytes leave a bucket, which machines share that know nothing of each other's requests.

    bytes/<digest>/<copy>/…        see `adapters.objects.copies`
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
"""

import secrets
import threading
from collections.abc import Callable, Iterable

from adapters.objects.bucket import Bucket
from adapters.objects.copies import Copies, Copy

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
