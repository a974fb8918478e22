"""What a project may store, and a key: asked before an upload is read or a job queued.

What is being received counts with what is stored, so that uploads at the same moment don't exceed it together:
each enters its bytes first, and is then asked beside those that were there before it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import TYPE_CHECKING

from server.api.access.space import require_space
from server.counted import counted
from server.errors import Forbidden

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
                f"the {owner} may store {counted(most, 'byte')}, has {stored} and would add {num_bytes}: delete "
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
