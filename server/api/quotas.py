"""Checks of free disk space and of storage quotas, before an upload is read or a job is queued.

Bytes that are being received count like stored bytes, so that concurrent uploads can't exceed a quota together.
Each upload is counted before it is checked. The check includes all uploads that were counted earlier, and none
that were counted later.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import RLock
from typing import TYPE_CHECKING

from server.access.principal import EVERYBODY
from server.config import Settings
from server.errors import Forbidden, Unavailable
from server.jobs.room import refuse_beyond, stored_bytes
from server.training.spec import Method

CHECK_BYTES = 16 << 20
"""Bytes of an upload between two checks of the free disk space."""
_RETRY_SECONDS = 60.0


def require_space(settings: Settings, num_bytes: int = 0) -> None:
    """Raise Unavailable if the server's disk wouldn't have SMOLORA_MIN_FREE_BYTES left after `num_bytes` more."""
    if shutil.disk_usage(settings.home).free - num_bytes < settings.min_free_bytes:
        message = "the server's disk is full"
        if settings.min_free_bytes:
            least = settings.min_free_bytes.human_readable()
            message = f"the server's disk has less than {least} left (SMOLORA_MIN_FREE_BYTES)"
        raise Unavailable(message, retry_after=_RETRY_SECONDS, reason="disk")


class Spooling:
    """A count of the bytes that uploads still have to write to the disk. Use it from one event loop only."""

    def __init__(self) -> None:
        self._num_pending = 0

    @contextmanager
    def announced(self, settings: Settings, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Reserve disk space for an upload during the context. Yield a function to call with each piece's size.

        `num_bytes` is the upload's announced size, or 0 if none was announced. Raise Unavailable if the disk has
        no room for this upload and for what other uploads still have to write. After every CHECK_BYTES, the
        function checks this again, and raises Unavailable if there is no room left.
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
            if unseen >= CHECK_BYTES:
                unseen = 0
                require_space(settings, self._num_pending)

        try:
            yield received
        finally:
            self._num_pending -= pending


if TYPE_CHECKING:  # `deps` imports this module
    from server.api.deps import Services


class Incoming:
    """Counts the bytes that are being received for each owner (a project or a key). Thread-safe."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._lock = RLock()

    def of(self, owners: tuple[str, ...]) -> Mapping[str, int]:
        """Return the number of bytes that are being received for each owner."""
        with self._lock:
            return {owner: self._bytes[owner] for owner in owners}

    @contextmanager
    def adding(self, owners: tuple[str, ...], num_bytes: int) -> Iterator[Mapping[str, int]]:
        """Add `num_bytes` to each owner's count until the context ends. Yield the counts from before."""
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
        self._bytes += Counter()  # drops owners without bytes


@contextmanager
def reserved(services: "Services", num_bytes: int) -> Iterator[None]:
    """Reserve `num_bytes` of the caller's quotas until the context ends.

    Raise Forbidden if a quota would be exceeded. This does disk I/O, so it may block.
    """
    with services.limiters.incoming.adding(owners_of(services), num_bytes) as before:
        if num_bytes:  # 0 more bytes are allowed even if the quota is exactly full
            require_quota(services, num_bytes, before)
        yield


@contextmanager
def growing(services: "Services", num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that must be called with a file's total size as the file grows.

    `num_bytes` of the caller's quotas are reserved already. The function reserves the bytes beyond `num_bytes`,
    until the context ends. It raises Forbidden if a quota would be exceeded, or Unavailable if the disk is nearly
    full. It does disk I/O, so it may block.
    """
    with ExitStack() as reservations:

        def grown(total: int) -> None:
            nonlocal num_bytes
            if total > num_bytes:
                require_space(services.settings)
                reservations.enter_context(reserved(services, total - num_bytes))
                num_bytes = total

        yield grown


def require_quota(services: "Services", num_bytes: int = 0, before: Mapping[str, int] | None = None) -> None:
    """Raise Forbidden if `num_bytes` more would exceed the quota of the caller's project or key.

    `before` has the bytes of other uploads that also count, by owner. If it is None, all uploads that are being
    received now count. This does disk I/O, so it may block.
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
        # bytes stored in the meantime count twice
        refuse_beyond(most, owner, before[owner] + _stored_bytes(services, key_id), num_bytes)


def quota_use(services: "Services") -> dict[tuple[str, str], float]:
    """Return the used share of each project's limits on jobs and bytes, by project and limit.

    This does disk I/O, so it may block.
    """
    found = {}
    for project in services.access.projects.list():
        quota = project.quota
        if quota.max_jobs is None and quota.max_bytes is None:
            continue
        own = services.of(replace(EVERYBODY, project=project.name, sees_all=False))
        if quota.max_jobs is not None:
            found[project.name, "max_jobs"] = own.jobs.num_unfinished() / quota.max_jobs
        if quota.max_bytes is not None:
            found[project.name, "max_bytes"] = _stored_bytes(own) / quota.max_bytes
    return found


def require_method(services: "Services", method: Method) -> None:
    """Raise Forbidden if the caller's limits don't allow jobs of this method."""
    principal = services.principal
    if method == "full" and False in (principal.quota.allow_full, principal.project_quota.allow_full):
        message = "method: full fine-tuning isn't allowed here (the limit allow_full): set it to lora"
        raise Forbidden(message, reason="limit")


@contextmanager
def room_for_job(services: "Services", num_bytes: int, method: Method = "lora") -> Iterator[None]:
    """Reserve what a new job may store until the context ends.

    Raise Unavailable or Forbidden if the disk or the caller's quotas leave no room for it, or if the caller's
    limits don't allow its method. With 0 bytes, this is only checked.
    """
    require_method(services, method)
    if num_bytes:
        with reserved(services, num_bytes):
            yield
    else:
        require_space(services.settings)
        require_quota(services)
        yield


def _stored_bytes(services: "Services", key_id: str | None = None) -> int:
    """Return what the project stores, or only what was created with this key. This may block on the disk."""
    return stored_bytes(services.submissions.sources, services.library.catalog, services.jobs, key_id)


def owners_of(services: "Services") -> tuple[str, str]:
    """Return the owners of the caller's uploads: the caller's project and key."""
    return f"project {services.principal.project}", f"key {services.principal.key_id}"
