"""An object store, S3's protocol or a directory that machines share: keys and bytes, and one error where it fails.

Credentials, region and endpoint are the usual AWS_* variables, which obstore reads. What fails is tried again,
with jitter, for `patience` seconds; one that doesn't answer by then costs at most as much again. Every write
is one that may be repeated: nothing here asks for a conditional put, which not every store has.
"""

import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from adapters.errors import BytesUnavailable, SmoloraError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PATIENCE = 20.0
"""Seconds for which an operation is tried again."""
RETRY_AFTER = 5.0
_PIECE = 16 << 20  # a request's share of a large object
_KEYS = 1000  # of one delete
_FILE = "file://"
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")

T = TypeVar("T")

log = logging.getLogger("smolora.bytes")


@dataclass(frozen=True)
class Stored:
    """An object: its key below the bucket's prefix, its bytes, and when the store took it, by its own clock."""

    key: str
    size: int
    modified: datetime


class Missing(SmoloraError):
    """There is no such object, or none any more."""


class Bucket:
    """The objects below one prefix. Thread-safe. All of it raises BytesUnavailable."""

    def __init__(self, store: "ObjectStore", patience: float, prefix: str = "") -> None:
        """`prefix` ends in a slash, or is empty."""
        self._store = store
        self._patience = patience
        self._prefix = prefix

    @classmethod
    def open(cls, url: str, *, allow_http: bool = False, patience: float = PATIENCE) -> "Bucket":
        """The bucket of `s3://bucket/prefix`, or the directory of `file:///directory`, which is made.

        `allow_http`: to send credentials over connections that aren't encrypted. Raises ValueError.
        """
        if url.startswith(_FILE):
            return cls(LocalStore(url.removeprefix(_FILE), mkdir=True, automatic_cleanup=True), patience)
        try:
            store = S3Store.from_url(
                url,
                client_options={
                    "allow_http": allow_http,
                    "connect_timeout": timedelta(seconds=patience / 4),
                    "read_timeout": timedelta(seconds=patience / 2),
                    "timeout": timedelta(seconds=4 * patience),  # of a piece, which may move all the while
                },
                retry_config={
                    "max_retries": 100,
                    "retry_timeout": timedelta(seconds=patience),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "max_backoff": timedelta(seconds=2),
                        "base": 2,
                    },
                },
            )
        except BaseError as error:
            raise ValueError(f"{type(error).__name__} about its address or the AWS_ variables") from None
        return cls(store, patience)

    def under(self, prefix: str) -> "Bucket":
        """The objects whose keys go on with `prefix` and a slash."""
        return Bucket(self._store, self._patience, f"{self._prefix}{prefix}/")

    def put(self, key: str, data: bytes) -> None:
        """Store the object, in the place of an older one."""
        self._ask(lambda: obstore.put(self._store, self._prefix + key, data))

    def put_file(self, key: str, path: Path) -> None:
        """The same of a file's content. Raises OSError where it can't be read."""
        with path.open("rb"):
            self._ask(lambda: obstore.put(self._store, self._prefix + key, path))

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises Missing."""
        return self._ask(lambda: bytes(obstore.get(self._store, self._prefix + key).bytes()))

    def copy_to(self, stored: Stored, file: BinaryIO) -> None:
        """Write the object's bytes. Raises Missing, also where it has become another, and OSError."""
        key = self._prefix + stored.key
        for start in range(0, stored.size, _PIECE):
            length = min(_PIECE, stored.size - start)
            piece = self._ask(partial(obstore.get_range, self._store, key, start=start, length=length))
            if len(piece) != length:
                raise Missing(f"{stored.key} is no longer as long as it was")
            file.write(piece)

    def listed(self, prefix: str = "") -> list[Stored]:
        """All objects below the prefix (whole names between slashes), by key."""
        own, below = len(self._prefix), (self._prefix + prefix).rstrip("/") or None
        found = self._ask(lambda: obstore.list(self._store, below).collect())
        kept = [Stored(str(m["path"])[own:], int(m["size"]), m["last_modified"]) for m in found]
        return sorted(kept, key=lambda stored: stored.key)

    def folders(self) -> list[str]:
        """The names before the first slash of all keys."""
        if isinstance(self._store, LocalStore):  # which tells of empty folders as well: a kill leaves some
            return sorted({stored.key.split("/", 1)[0] for stored in self.listed() if "/" in stored.key})
        own, below = len(self._prefix), self._prefix.rstrip("/") or None
        found = self._ask(lambda: obstore.list_with_delimiter(self._store, below))
        return sorted(str(name)[own:].rstrip("/") for name in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects; those that aren't there don't matter. In which order, nobody knows."""
        own = [self._prefix + key for key in keys]
        at_once = 1 if isinstance(self._store, LocalStore) else _KEYS
        for start in range(0, len(own), at_once):
            with suppress(Missing):
                self._ask(partial(obstore.delete, self._store, own[start : start + at_once]))

    def try_out(self, num_bytes: int) -> None:
        """Put an object of so many bytes, and remove it: one that has no room may take an empty one."""
        key = f"clock/{secrets.token_hex(8)}"  # as those of `now`, which nobody looks for
        self._ask(lambda: obstore.put(self._store, key, bytes(num_bytes)))
        self._ask(lambda: obstore.delete(self._store, key))

    def now(self) -> datetime:
        """The store's clock, by which `Stored.modified` is."""
        key = f"clock/{secrets.token_hex(8)}"  # whatever the prefix
        self._ask(lambda: obstore.put(self._store, key, b""))
        found = self._ask(lambda: obstore.head(self._store, key))
        self._ask(lambda: obstore.delete(self._store, key))
        modified: datetime = found["last_modified"]
        return modified

    def _ask(self, question: Callable[[], T]) -> T:
        """Its answer. obstore tries again what it knows to be safe. All that is asked here is: so whatever got no
        answer is asked again. Raises Missing, BytesUnavailable.
        """
        until = time.monotonic() + self._patience
        while True:
            try:
                return question()
            except (BaseError, OSError) as error:
                # a store's own words may quote what was signed
                found = _CODE.search(str(error)) or _STATUS.search(str(error))
                if isinstance(error, FileNotFoundError) and (found is None or found[1] in ("404", "NoSuchKey")):
                    raise Missing("there is no such object") from None
                if found is not None or time.monotonic() > until:
                    reason = f": {found[1]}" if found else ""
                    log.warning("the object store failed: %s%s", type(error).__name__, reason)
                    raise BytesUnavailable(retry_after=RETRY_AFTER) from None
            time.sleep(random.uniform(0, min(1.0, self._patience / 4)))
