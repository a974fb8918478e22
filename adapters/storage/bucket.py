"""Blobs in an object store: one that speaks S3's protocol, or a directory that several machines mount.

Credentials, region and endpoint come from the usual AWS_* variables, which obstore reads. A failed request is
retried with jitter for `patience` seconds, and the last attempt may take as long again. All requests may be
repeated. Conditional puts, which may not, aren't used; some stores don't support them anyway.

If the store gave no answer in all that time, other operations fail at once for OUTAGE_SECONDS. So what a
caller does after a failure, such as removing what it has uploaded, doesn't wait as long again.
"""

import hashlib
import logging
import math
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import obstore
from obstore import Bytes
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from adapters.errors import BytesUnavailable
from adapters.storage.blobs import Missing, Stored

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PATIENCE = 20.0
"""Seconds for which a failed operation is retried."""
RETRY_AFTER = 5.0
OUTAGE_SECONDS = RETRY_AFTER
"""Seconds for which operations fail at once after one that had no answer."""
_PIECE = 16 << 20  # bytes of a large object that one request reads
_KEYS = 1000  # the most keys that S3 deletes in one request
_FILE = "file://"
_RETRIED = frozenset({"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout"})  # codes
_RETRIED_STATUSES = frozenset({"500", "502", "503", "504", "507"})  # whatever the code, which stores may invent
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")

T = TypeVar("T")

log = logging.getLogger("smolora.bytes")


class _Outage:
    """Whether the store gave no answer for long. One object for all prefixes of a store. Thread-safe."""

    def __init__(self) -> None:
        self._failed_at = self._answered_at = -math.inf

    @property
    def is_on(self) -> bool:
        return self._answered_at < self._failed_at > time.monotonic() - OUTAGE_SECONDS

    def answered(self) -> None:
        self._answered_at = time.monotonic()

    def failed(self, began: float) -> None:
        """Note that an operation had no answer in all its time, unless others had one since it `began`."""
        if self._answered_at < began:
            self._failed_at = time.monotonic()


class Bucket:
    """The objects below one prefix, with the methods of `Blobs`. Thread-safe.

    All methods raise BytesUnavailable if the object store fails or doesn't answer in time.
    """

    def __init__(
        self, store: "ObjectStore", patience: float, prefix: str = "", outage: _Outage | None = None
    ) -> None:
        """`prefix` ends in a slash, or is empty. Buckets of one store share their `outage`."""
        self._store = store
        self._patience = patience
        self._prefix = prefix
        self._outage = outage or _Outage()

    @classmethod
    def open(cls, url: str, *, allow_http: bool = False, patience: float = PATIENCE) -> "Bucket":
        """Open `s3://bucket/prefix`, or `file:///directory`, which is created if it doesn't exist.

        `allow_http` permits unencrypted connections, over which credentials are sent. Raise ValueError if the URL
        or the AWS_* variables are wrong.
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
                    "timeout": timedelta(seconds=4 * patience),  # for one piece, even if bytes keep arriving
                },
                retry_config={
                    "max_retries": 100,
                    "retry_timeout": timedelta(seconds=patience / 2),  # `_ask` goes on
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "max_backoff": timedelta(seconds=min(2.0, patience / 10)),
                        "base": 2,
                    },
                },
            )
        except BaseError as error:
            raise ValueError(f"{type(error).__name__} about its address or the AWS_ variables") from None
        return cls(store, patience)

    def under(self, prefix: str) -> "Bucket":
        """Return the bucket of all objects below `prefix`, which is given without a slash at its end."""
        return Bucket(self._store, self._patience, f"{self._prefix}{prefix}/", self._outage)

    def put(self, key: str, data: bytes) -> None:
        """Store the object. An existing object with this key is replaced."""
        self._ask(lambda: obstore.put(self._store, self._prefix + key, data))

    def put_file(self, key: str, path: Path) -> None:
        """Store a file's content as `put` does. Raise OSError if the file can't be read."""
        with path.open("rb"):
            self._ask(lambda: obstore.put(self._store, self._prefix + key, path))

    def get(self, key: str) -> bytes:
        """Return the object's bytes. Raise Missing if there is no such object."""
        return self._ask(lambda: bytes(obstore.get(self._store, self._prefix + key).bytes()))

    def copy_to(self, stored: Stored, file: BinaryIO) -> None:
        """Write the object's bytes to the file.

        Raise Missing if the object was deleted or became shorter, or OSError if the file can't be written.
        """
        for piece in self._pieces(stored):
            file.write(piece)

    def digest(self, stored: Stored) -> str:
        """Return the SHA-256 of the object's bytes, in hexadecimal digits. Raise Missing as `copy_to` does."""
        digest = hashlib.sha256()
        for piece in self._pieces(stored):
            digest.update(piece)
        return digest.hexdigest()

    def listed(self, prefix: str = "") -> list[Stored]:
        """Return all objects below the prefix, ordered by key. The prefix ends in a slash, or is empty."""
        own, below = len(self._prefix), (self._prefix + prefix).rstrip("/") or None
        found = self._ask(lambda: obstore.list(self._store, below).collect())
        kept = [Stored(str(m["path"])[own:], int(m["size"]), m["last_modified"]) for m in found]
        return sorted(kept, key=lambda stored: stored.key)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of all objects below the prefix, in order."""
        return [stored.key for stored in self.listed(prefix)]

    def folders(self) -> list[str]:
        """Return the names of the top-level folders: what precedes the first slash of each key that has one."""
        if isinstance(self._store, LocalStore):  # it also lists empty folders, which killed processes leave
            return sorted({stored.key.split("/", 1)[0] for stored in self.listed() if "/" in stored.key})
        own, below = len(self._prefix), self._prefix.rstrip("/") or None
        found = self._ask(lambda: obstore.list_with_delimiter(self._store, below))
        return sorted(str(name)[own:].rstrip("/") for name in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects. Missing keys are ignored. The order is unspecified."""
        own = [self._prefix + key for key in keys]
        at_once = 1 if isinstance(self._store, LocalStore) else _KEYS
        for start in range(0, len(own), at_once):
            with suppress(Missing):
                self._ask(partial(obstore.delete, self._store, own[start : start + at_once]))

    def reach(self, num_bytes: int) -> None:
        """Raise BytesUnavailable if an object of `num_bytes` can't be written now.

        If `num_bytes` is 0, check instead that objects can be deleted now. Writing an empty object would check
        nothing, since a full store may accept it.
        """
        key = f"clock/{secrets.token_hex(8)}"  # next to the probes of `now`: nothing reads this folder
        if num_bytes:
            self._ask(lambda: obstore.put(self._store, key, bytes(num_bytes)))
        with suppress(Missing):
            self._ask(lambda: obstore.delete(self._store, key))

    def clean(self, prefix: str) -> None:
        """Do nothing: an object is never half-written."""

    def now(self) -> datetime:
        """Return the time by the store's clock, which `Stored.modified` uses too."""
        key = f"clock/{secrets.token_hex(8)}"  # outside of every prefix
        self._ask(lambda: obstore.put(self._store, key, b""))
        found = self._ask(lambda: obstore.head(self._store, key))
        self._ask(lambda: obstore.delete(self._store, key))
        modified: datetime = found["last_modified"]
        return modified

    def _pieces(self, stored: Stored) -> Iterator[Bytes]:
        key = self._prefix + stored.key
        for start in range(0, stored.size, _PIECE):
            length = min(_PIECE, stored.size - start)
            piece = self._ask(partial(obstore.get_range, self._store, key, start=start, length=length))
            if len(piece) != length:
                raise Missing(f"{stored.key} is no longer as long as it was")
            yield piece

    def _ask(self, question: Callable[[], T]) -> T:
        """Return what `question`, one request to the store, returns.

        Raise Missing if there is no such object, or BytesUnavailable if the store fails or gives no answer.
        obstore retries only requests that it knows to be idempotent. All of ours are, so a request without an
        answer is sent again.
        """
        if self._outage.is_on:
            raise BytesUnavailable(retry_after=RETRY_AFTER)
        began = time.monotonic()
        while True:
            try:
                answer = question()
                self._outage.answered()
                return answer
            except (BaseError, OSError) as error:
                # Only a code is logged: the store's own message may quote what was signed.
                status = _STATUS.search(str(error))
                found = _CODE.search(str(error)) or status
                if isinstance(error, FileNotFoundError) and (found is None or found[1] in ("404", "NoSuchKey")):
                    self._outage.answered()
                    raise Missing("there is no such object") from None
                is_over = time.monotonic() - began > self._patience
                if found is not None or isinstance(self._store, LocalStore):  # a disk's error is an answer
                    self._outage.answered()
                elif is_over:
                    self._outage.failed(began)
                is_transient = found is None or found[1] in _RETRIED or (status and status[1] in _RETRIED_STATUSES)
                if is_over or not is_transient:
                    reason = f": {found[1]}" if found else ""
                    log.warning("the object store failed: %s%s", type(error).__name__, reason)
                    raise BytesUnavailable(retry_after=RETRY_AFTER) from None
            time.sleep(random.uniform(0, min(1.0, self._patience / 4)))
