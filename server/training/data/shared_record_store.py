"""Records and their files in a bucket that machines share: each a folder of `adapters.objects.copies`.

Of an id that two machines stored at once there are two copies: the older one counts for both. A file that is read
comes to an unnamed one on this machine's disk first, so that it outlives a delete.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, cast

from adapters.durable import ABANDONED_AFTER, UNFINISHED
from adapters.errors import NotFound, SmoloraError
from adapters.objects.bucket import Bucket, Missing
from adapters.objects.copies import Copies, Copy
from server.training.data.record_store import R, RecordStore

_MAX_REMEMBERED = 10_000


class SharedRecordStore(RecordStore[R]):
    """As `RecordStore`; nothing stays under `root`. Whatever asks the bucket raises BytesUnavailable."""

    def __init__(
        self,
        root: Path,
        ids: re.Pattern[str],
        file_name: str,
        decode: Callable[[Mapping[str, object]], R],
        missing: str,
        corrupt: type[SmoloraError],
        bucket: Bucket,
    ) -> None:
        super().__init__(root, ids, file_name, decode, missing, corrupt)
        self._copies = Copies(bucket, file_name)
        self._bucket = bucket
        self._remembered: dict[tuple[str, str], R] = {}  # by id and copy: no copy ever changes

    @contextmanager
    def new(self, record_id: str) -> Iterator[Path]:
        with self._filled(record_id) as directory:
            yield directory
            if self._copy(record_id) is None:
                self._copies.push(record_id, directory)

    @contextmanager
    def renewed(self, record_id: str) -> Iterator[Path]:
        damaged = self._copies.whole(record_id)
        with self._filled(record_id) as directory:
            yield directory
            self._copies.push(record_id, directory)
        self._copies.remove(damaged)

    def open(self, record_id: str, name: str) -> BinaryIO:
        copy = self._copy(record_id)
        if copy is None or name not in copy.files:
            raise FileNotFoundError(record_id)
        self._root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            file = opened.enter_context(tempfile.TemporaryFile(dir=self._root))
            try:
                self._bucket.copy_to(copy.files[name], cast("BinaryIO", file))
            except Missing:  # deleted just now
                raise FileNotFoundError(record_id) from None
            file.seek(0)
            opened.pop_all()
            return cast("BinaryIO", file)

    def digest(self, record_id: str, name: str) -> str:
        copy = self._copy(record_id)
        if copy is None or name not in copy.files:
            raise FileNotFoundError(record_id)
        hashed = _Hashed()
        try:
            self._bucket.copy_to(copy.files[name], cast("BinaryIO", hashed))
        except Missing:  # deleted just now
            raise FileNotFoundError(record_id) from None
        return hashed.digest.hexdigest()

    def find(self, record_id: str) -> R | None:
        copy = self._copy(record_id)
        return None if copy is None else self._record(copy)

    def has(self, record_id: str) -> bool:
        return self._copy(record_id) is not None

    def present(self, record_ids: set[str]) -> set[str]:
        """As `RecordStore.present`; several in one listing."""
        return record_ids & self.ids() if len(record_ids) > 1 else super().present(record_ids)

    def ids(self) -> set[str]:
        return set(self._whole())

    def list(self) -> list[R]:
        copies = self._whole()
        return self._readable(copies, lambda record_id: self._record(copies[record_id]))

    def delete(self, record_id: str) -> None:
        self.place(record_id)
        copies = self._copies.of(record_id)
        if not any(copy.is_whole for copy in copies):
            raise NotFound(self._missing)
        self._copies.remove(copies)

    def clean(self) -> None:
        """As `RecordStore.clean`, and halves of uploads in the bucket."""
        super().clean()
        before = self._bucket.now() - timedelta(seconds=ABANDONED_AFTER)
        self._copies.remove(c for c in self._copies.all() if not c.is_whole and c.modified < before)

    @contextmanager
    def _filled(self, record_id: str) -> Iterator[Path]:
        """A directory on this machine's disk, for as long as the block."""
        self._root.mkdir(parents=True, exist_ok=True)
        self.place(record_id)  # or it can't be an id
        directory = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{record_id}-", dir=self._root))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _whole(self) -> dict[str, Copy]:
        """The copy of each record that counts."""
        found: dict[str, Copy] = {}
        for copy in self._copies.all():
            if copy.is_whole and self._ids.fullmatch(copy.folder):
                found.setdefault(copy.folder, copy)
        return found

    def _copy(self, record_id: str) -> Copy | None:
        self.place(record_id)
        return next(iter(self._copies.whole(record_id)), None)

    def _record(self, copy: Copy) -> R | None:
        key = (copy.folder, copy.id)
        if (record := self._remembered.get(key)) is None:
            try:
                record = self._decode(json.loads(self._copies.read(copy, self._file_name)))
            except Missing:
                return None
            except ValueError:
                raise self._unreadable(copy.folder) from None
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = record
        return record


class _Hashed:
    """Hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, piece: bytes) -> None:
        self.digest.update(piece)
