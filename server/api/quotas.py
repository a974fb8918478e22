"""Room on the disk that is left to what runs already.

What a project may store, and a key: asked before an upload is read or a job queued.

What is being received counts with what is stored, so that uploads at the same moment don't exceed it together:
each enters its bytes first, and is then asked beside those that were there before it.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import TYPE_CHECKING

from server.config import Settings
from server.errors import Forbidden, Unavailable
from server.system.messages import plural

LOOK_BYTES = 16 << 20
"""Of an upload, between two looks at the disk."""
_RETRY_SECONDS = 60.0


def require_space(settings: Settings, num_bytes: int = 0) -> None:
    """Raise Unavailable if HOME's disk, with `num_bytes` more, has less free than uploads and jobs must leave."""
    if shutil.disk_usage(settings.home).free - num_bytes < settings.min_free_bytes:
        message = "the server's disk is full"
        if settings.min_free_bytes:
            least = settings.min_free_bytes.human_readable()
            message = f"the server's disk has less than {least} left (SMOLORA_MIN_FREE_BYTES)"
        raise Unavailable(message, retry_after=_RETRY_SECONDS)


class Spooling:
    """The bytes that uploads in flight still have to write to the disk. For one event loop."""

    def __init__(self) -> None:
        self._num_pending = 0

    @contextmanager
    def announced(self, settings: Settings, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Keep room for an upload within the context; yield what to call with the size of each of its pieces.

        `num_bytes` are what it announces, 0 if it doesn't. Raises Unavailable if the disk has no room for it and
        for the rest of the others; so does the call, which looks again every LOOK_BYTES.
        """
        require_space(settings, self._num_pending + num_bytes)
        self._num_pending += num_bytes
        pending, unseen = num_bytes, 0

        def received(size: int) -> None:
            nonlocal pending, unseen
            written = min(size, pending)
            pending -= written
            self._num_pending -= written
            unseen += size
            if unseen >= LOOK_BYTES:
                unseen = 0
                require_space(settings, self._num_pending)

        try:
            yield received
        finally:
            self._num_pending -= pending


if TYPE_CHECKING:  # it has one of these
    from server.api.deps import Services


class Incoming:
    """Bytes that are just being received, by whose they will be. Thread-safe."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._lock = RLock()

    def of(self, owners: tuple[str, ...]) -> Mapping[str, int]:
        """How many each has just now."""
        with self._lock:
            return {owner: self._bytes[owner] for owner in owners}

    @contextmanager
    def counted(self, owners: tuple[str, ...], num_bytes: int) -> Iterator[Mapping[str, int]]:
        """So many more, within the context; yields how many there were before, by owner."""
        with self._lock:
            before = self.of(owners)
            self._add(owners, num_bytes)
        try:
            yield before
        finally:
            with self._lock:
                self._add(owners, -num_bytes)

    def _add(self, owners: tuple[str, ...], num_bytes: int) -> None:
        for owner in owners:
            self._bytes[owner] += num_bytes
        self._bytes += Counter()  # those of nothing go


@contextmanager
def reserved(services: "Services", num_bytes: int) -> Iterator[None]:
    """So many bytes more are the caller's, within the context. Blocks on disk. Raises Forbidden."""
    with services.limiters.incoming.counted(owners_of(services), num_bytes) as before:
        if num_bytes:  # or what has come fills the quota exactly
            require_quota(services, num_bytes, before)
        yield


@contextmanager
def growing(services: "Services", num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how large something is by now, of which `num_bytes` are reserved already.

    What is more is reserved within the context. Blocks on disk. Raises Forbidden, or Unavailable where the disk is
    nearly full.
    """
    with ExitStack() as held:

        def grown(total: int) -> None:
            nonlocal num_bytes
            if total > num_bytes:
                require_space(services.settings)
                held.enter_context(reserved(services, total - num_bytes))
                num_bytes = total

        yield grown


def require_quota(services: "Services", num_bytes: int = 0, before: Mapping[str, int] | None = None) -> None:
    """Raise Forbidden where so many bytes more are too many for the project or the key. Blocks on disk.

    `before` are those that were being received already, by owner; None: whatever is just now.
    """
    principal = services.principal
    project, key = owners = owners_of(services)
    before = services.limiters.incoming.of(owners) if before is None else before
    bounds = (
        (project, principal.project_quota.max_bytes, None),
        (key, principal.quota.max_bytes, principal.key_id),
    )
    for owner, most, key_id in bounds:
        if most is None:
            continue
        stored = before[owner] + stored_bytes(services, key_id)  # what arrived since counts twice
        if stored + num_bytes > most or stored >= most:
            raise Forbidden(
                f"the {owner} may store {plural(most, 'byte')}, has {stored} and would add {num_bytes}: delete "
                "adapters, data sets or files, or have max_bytes raised"
            )


def require_room(services: "Services") -> None:
    """Raise Unavailable or Forbidden where the disk, or the caller's quota, leaves none for a new job."""
    require_space(services.settings)
    require_quota(services)


def owners_of(services: "Services") -> tuple[str, str]:
    """Whose bytes the caller's uploads are."""
    return f"project {services.principal.project}", f"key {services.principal.key_id}"


def stored_bytes(services: "Services", key_id: str | None = None) -> int:
    """Of the project's adapters, data sets and files: all, or what one key brought. Blocks on disk."""
    datasets = sum(d.stored_bytes for d in services.datasets.list() if key_id in (None, d.key_id))
    files = sum(file.bytes for file in services.files.list() if key_id in (None, file.key_id))
    return datasets + files + services.library.catalog.num_bytes(key_id)
