"""The bytes of adapters: immutable directories named by digest, published by one rename.

    <root>/<digest[:2]>/<digest>/adapter_config.json          what PEFT reads; an upload's as it was uploaded
                                 adapter_model.safetensors
                                 smolora.json                 effective scalings and sizes, for quick loading
    <root>/.tmp-…                                             being written, or being removed

A directory is there whole or not at all, wherever a process is killed. Several processes may use one root. Which
digests are wanted is the catalog's to say, and processes race: so whoever publishes calls `put`, commits the
version, and calls `put` once more, while `discard` asks `in_use` at the last moment: whichever is last is right.
"""

import fcntl
import io
import os
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters import sidecar
from adapters.errors import CorruptAdapter, InvalidAdapter
from adapters.lora import BaseShape, LoraWeights
from adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read, write, write_synced
from adapters.sidecar import SIDECAR_NAME

TEMPORARY = ".tmp-"
LEFTOVER_AGE = 3600.0
"""Seconds after which what a killed process left behind is taken for abandoned."""

InUse = Callable[[str], bool]
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _never(digest: str) -> bool:
    return False


class AdapterStore:
    """The adapters under one root. Thread-safe; pins count within this process."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._mutex = threading.Lock()  # guards the two below, and that nothing pinned is removed
        self._pins: Counter[str] = Counter()
        self._doomed: dict[str, InUse] = {}
        self._clean()

    def put(self, adapter: PeftAdapter, original: Mapping[str, bytes] | None = None) -> int:
        """Stores the adapter under its weights' digest, unless it is there already; returns the bytes stored.

        `original` may hold the adapter_config.json that was uploaded, which is kept as it is; the tensors are
        always written anew, the same bytes in our order. Of two adapters with one digest, the first one's stay.
        """
        digest = adapter.weights.digest
        place = self._place(digest)
        with self._mutex:
            self._doomed.pop(digest, None)
        with self._locked():
            if sidecar.is_whole(place):
                return _size(place)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._root))
        leftovers = [temporary]
        try:
            write(temporary, adapter)
            if original and CONFIG_NAME in original:
                write_synced(temporary / CONFIG_NAME, original[CONFIG_NAME])
            write_synced(temporary / SIDECAR_NAME, sidecar.describe(adapter.weights, temporary))
            _sync_directory(temporary)
            with self._locked():
                if sidecar.is_whole(place):  # another thread or process was quicker
                    return _size(place)
                num_bytes = _size(temporary)
                leftovers += self._set_aside(place)
                place.parent.mkdir(exist_ok=True)
                temporary.rename(place)
                _sync_directory(place.parent)
                _sync_directory(self._root)
        finally:
            _delete(leftovers)
        return num_bytes  # counted before: by now somebody may have discarded it

    def load(self, digest: str) -> LoraWeights:
        """The weights, mapped from the file: quick, as nothing is copied and the digest isn't computed anew.

        They outlive a discard. Raises CorruptAdapter if the bytes are missing or don't fit together.
        """
        return sidecar.load(self._place(digest), digest)

    def read(self, digest: str, base: BaseShape) -> PeftAdapter:
        """The adapter with its configuration, checked as an upload is. Raises CorruptAdapter."""
        place = self._place(digest)
        try:
            return read((place / CONFIG_NAME).read_bytes(), place / WEIGHTS_NAME, base)
        except (OSError, InvalidAdapter) as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def verify(self, digest: str) -> None:
        """Reads all bytes and raises CorruptAdapter unless they have the digest."""
        if self.load(digest).digest != digest:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} no longer matches its digest")

    def archive(self, digest: str) -> bytes:
        """A zip of PEFT's two files; equal adapters make equal zips. CorruptAdapter if they are missing."""
        place = self._place(digest)
        buffer = io.BytesIO()
        try:
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # weights hardly deflate
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    entry = zipfile.ZipInfo(name)  # of a fixed date
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, (place / name).read_bytes())
        except OSError as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
        return buffer.getvalue()

    def pin(self, digests: Iterable[str]) -> None:
        """Keeps the bytes of each until an `unpin`, whatever is discarded meanwhile; they needn't be there yet."""
        with self._mutex:
            self._pins.update(digests)

    def unpin(self, digests: Iterable[str]) -> None:
        """Takes back one `pin` of each; what was discarded meanwhile goes with its last one."""
        freed: list[Path] = []
        with self._mutex:
            for digest in digests:
                self._pins[digest] -= 1
                assert self._pins[digest] >= 0, "unpinned more often than pinned"
                if self._pins[digest] == 0:
                    del self._pins[digest]
                    if digest in self._doomed:
                        freed += self._remove(digest, self._doomed.pop(digest))
        _delete(freed)

    def discard(self, digest: str, in_use: InUse = _never) -> None:
        """Removes the bytes now, or at the last `unpin`, unless `in_use(digest)` then says that they are wanted.

        A `put` before then revives them. Discarding what isn't there does nothing.
        """
        with self._mutex:
            if self._pins[digest] > 0:
                self._doomed[digest] = in_use
                return
            freed = self._remove(digest, in_use)
        _delete(freed)

    def sweep(self, in_use: InUse) -> list[str]:
        """Discards what nobody wants: left by a process that was killed between storing and publishing.

        Adapters that were stored within the last hour are left alone. Returns the digests discarded.
        """
        old = [
            path
            for path in self._root.glob("[0-9a-f][0-9a-f]/*")
            if _DIGEST.fullmatch(path.name) and _is_old(path)
        ]
        unwanted = [path.name for path in old if not in_use(path.name)]
        for digest in unwanted:
            self.discard(digest, in_use)
        return unwanted

    def _remove(self, digest: str, in_use: InUse) -> list[Path]:
        """Moves the directory out of sight; what is returned remains to be deleted."""
        with self._locked():
            return [] if in_use(digest) else self._set_aside(self._place(digest))

    def _set_aside(self, place: Path) -> list[Path]:
        aside = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._root))
        with suppress(FileNotFoundError):
            place.rename(aside / place.name)
            _sync_directory(place.parent)
        return [aside]

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest is 64 hexadecimal digits")
        return self._root / digest[:2] / digest

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; held for a few file operations only."""
        with open(self._root / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _clean(self) -> None:
        _delete(path for path in self._root.glob(f"{TEMPORARY}*") if _is_old(path))


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE
    except FileNotFoundError:
        return False


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
