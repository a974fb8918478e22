"""What a project may store, and a key: asked before an upload is read or a job queued.

What is being received counts with what is stored, so that uploads at the same moment don't exceed it together.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.counted import counted
from server.errors import Forbidden

if TYPE_CHECKING:  # it has one of these
    from server.api.deps import Services


class Incoming:
    """Bytes that are just being received, by whose they will be. For one event loop."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def of(self, owner: str) -> int:
        return self._bytes[owner]

    @contextmanager
    def counted(self, owners: tuple[str, ...], num_bytes: int) -> Iterator[None]:
        """So many more, within the context."""
        for owner in owners:
            self._bytes[owner] += num_bytes
        try:
            yield
        finally:
            for owner in owners:
                self._bytes[owner] -= num_bytes
            self._bytes += Counter()  # those of nothing go


def require_quota(services: "Services", num_bytes: int = 0) -> None:
    """Raise Forbidden where so many bytes more are too many for the project or the key. Blocks on disk."""
    principal = services.principal
    bounds = (
        (f"project {principal.project}", principal.project_quota.max_bytes, None),
        (f"key {principal.key_id}", principal.quota.max_bytes, principal.key_id),
    )
    for owner, most, key_id in bounds:
        if most is None:
            continue
        stored = stored_bytes(services, key_id) + services.limiters.incoming.of(owner)
        if stored + num_bytes > most or stored >= most:
            raise Forbidden(
                f"the {owner} may store {counted(most, 'byte')}, has {stored} and would add {num_bytes}: delete "
                "adapters, data sets or files, or have max_bytes raised"
            )


def owners_of(services: "Services") -> tuple[str, str]:
    """Whose bytes the caller's uploads are."""
    return f"project {services.principal.project}", f"key {services.principal.key_id}"


def stored_bytes(services: "Services", key_id: str | None = None) -> int:
    """Of the project's adapters, data sets and files: all, or what one key brought. Blocks on disk."""
    datasets = sum(dataset.bytes for dataset in services.datasets.list() if key_id in (None, dataset.key_id))
    files = sum(file.bytes for file in services.files.list() if key_id in (None, file.key_id))
    return datasets + files + services.library.catalog.num_bytes(key_id)
