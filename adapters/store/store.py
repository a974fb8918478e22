"""The bytes of adapters: immutable directories named by digest, published by one rename.

    <root>/<digest[:2]>/<digest>/adapter_config.json          what PEFT reads, as first uploaded
                                 adapter_model.safetensors
                                 smolora.json                 the sidecar: effective scalings and sizes
    <root>/packed/                                            `adapters.store.packed`
    <root>/names/                                             `adapters.catalog.records`
    <root>/.tmp-...                                           being written, or being removed

A directory is whole or absent, whenever a process is killed. Several processes may use one root. The catalog
decides which digests are wanted, but one process may remove a digest's bytes while another publishes them. So a
publisher locks the directory until the version is committed (`publishing`). The lock ends with the process. Before
a process removes a directory, it locks the directory too, and then asks the catalog once more whether the bytes
are wanted.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adapters.errors import CorruptAdapter, InvalidAdapter
from adapters.lora import BaseShape, LoraModule, LoraWeights, ModuleKey
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read, read_ranks, write, write_synced
from adapters.peft.tensor_file import map_file, read_header, tensor_name
from adapters.storage.durable import sync
from adapters.store.packed import PackedFiles, open_all


def lock_folder(directory: Path, how: int) -> int | None:
    """Lock the directory, and return a handle. Closing the handle unlocks the directory.

    `how` is flock's operation. Return None if the directory is missing, or if `how` has LOCK_NB and another
    process has locked the directory.
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(handle, how)
        if os.path.samestat(os.fstat(handle), os.stat(directory)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another; or removed while we waited
    os.close(handle)
    return None


def delete_folders(paths: Iterable[Path]) -> None:
    """Remove files and folders; best effort."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def folder_size(place: Path) -> int:
    """Return the size of the folder's files in bytes. Raise OSError if the folder can't be read."""
    return sum(path.stat().st_size for path in place.iterdir())


InUse = Callable[[str], bool]
"""Returns whether the catalog wants a digest's bytes."""


class Pins:
    """The pinned digests, whose bytes this process uses, and those to discard once unpinned. Thread-safe.

    A digest may be pinned several times, and is unpinned once each of its pins is undone. Event loops pin, so no
    method waits for a disk, a database, or a discard of the same bytes.

    A discard first asks the catalog whether a name refers to the bytes, and then asks whether they are pinned. If
    neither, it removes them. A pin that precedes the second question keeps the bytes. A later pin may not, but no
    name refers to the bytes by then, since nothing publishes them during a discard. So a caller must look
    for a name *after* pinning (`adapters.library`).
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards both dicts; no callback is called while it is held
        self._counts: Counter[str] = Counter()
        self._doomed: dict[str, InUse] = {}

    def __contains__(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._counts

    def add(self, digests: Iterable[str]) -> None:
        """Pin each digest once more."""
        with self._mutex:
            self._counts.update(digests)

    def remove(self, digests: Iterable[str]) -> dict[str, InUse]:
        """Undo one `add` of each digest.

        Return the digests marked by `doom` that are no longer pinned, each with its `in_use`. The caller must
        discard them.
        """
        freed = {}
        with self._mutex:
            for digest in digests:
                self._counts[digest] -= 1
                assert self._counts[digest] >= 0, "unpinned more often than pinned"
                if self._counts[digest] == 0:
                    del self._counts[digest]
                    if (in_use := self._doomed.pop(digest, None)) is not None:
                        freed[digest] = in_use
        return freed

    def doom(self, digest: str, in_use: InUse) -> bool:
        """If the digest is pinned, mark it to be discarded once it is unpinned. Return whether it is pinned.

        The call of `remove` that undoes the last `add` returns the digest, unless `revive` is called before.
        """
        with self._mutex:
            if digest in self._counts:
                self._doomed[digest] = in_use
            return digest in self._counts

    def revive(self, digest: str) -> None:
        """Undo `doom`: don't discard the digest once it is unpinned."""
        with self._mutex:
            self._doomed.pop(digest, None)


SIDECAR_NAME = "smolora.json"
FORMAT = 1


def describe_sidecar(weights: LoraWeights, directory: Path) -> bytes:
    """Return the sidecar of `weights`, whose two files are in `directory`.

    It holds what would otherwise have to be derived by PEFT's rules: the modules and their effective scalings. The
    files' sizes show whether the directory is whole. The adapter's digest doesn't cover the configuration, so the
    sidecar has its SHA-256.
    """
    sizes = {name: (directory / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME)}
    modules = [[key.layer, key.module, module.scaling] for key, module in weights.modules.items()]
    document = {"format": FORMAT, "digest": weights.digest, "sizes": sizes, "modules": modules}
    document["config"] = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    return json.dumps(document, separators=(",", ":")).encode()


def matches_sidecar(directory: Path, damaged: os.stat_result | None = None) -> bool:
    """Return whether all files have their full sizes.

    Return False for the directory with the stat `damaged`, which is known to be damaged.
    """
    try:
        sizes = json.loads((directory / SIDECAR_NAME).read_bytes())["sizes"]
        has_all = all((directory / name).stat().st_size == sizes[name] for name in (CONFIG_NAME, WEIGHTS_NAME))
        return has_all and not (damaged is not None and os.path.samestat(directory.stat(), damaged))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged_stat(directory: Path, digest: str) -> os.stat_result | None:
    """Read all bytes. Return the directory's stat if they are damaged, or None if they are intact or missing."""
    try:
        found = directory.stat()
        check_weights(directory, digest, load_weights(directory, digest))
        return None
    except CorruptAdapter:
        return found
    except OSError:
        return None


def load_weights(directory: Path, digest: str) -> LoraWeights:
    """Return the weights, mapped from the file. Raise CorruptAdapter if anything is missing or inconsistent."""
    try:
        document = json.loads((directory / SIDECAR_NAME).read_bytes())
        if document["format"] != FORMAT:
            raise ValueError("a format of another version of smolora")
        buffer = map_file(directory / WEIGHTS_NAME)
        entries = read_header(buffer)
        modules: dict[ModuleKey, LoraModule] = {}
        for layer, name, scaling in document["modules"]:
            key = ModuleKey(layer, name)
            a, b = entries[tensor_name(key, "A")].view(buffer), entries[tensor_name(key, "B")].view(buffer)
            modules[key] = LoraModule(a, b, scaling)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
    return LoraWeights(modules)


def check_weights(directory: Path, digest: str, weights: LoraWeights) -> None:
    """Raise CorruptAdapter unless the weights match `digest`, and the configuration matches the sidecar."""
    if weights.digest != digest:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} no longer matches its digest")
    try:
        expected = json.loads((directory / SIDECAR_NAME).read_bytes())["config"]
        found = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
    if expected != found:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is damaged: its {CONFIG_NAME} was changed")


TEMPORARY = ".tmp-"

_DIGEST = re.compile(r"[0-9a-f]{64}")


def never(digest: str) -> bool:
    """Return False: an `InUse` for bytes that nothing wants."""
    return False


class AdapterStore:
    """The adapters under one root. Thread-safe. A pin keeps this process from removing bytes, but no other one."""

    is_in_bucket = False
    """Whether the bytes are in a bucket, which other machines may use at any time."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.packed = PackedFiles(root)
        self._root = root
        self._pins = Pins()

    def put(self, adapter: PeftAdapter, original: Mapping[str, bytes] | None = None) -> int:
        """Store the adapter under its weights' digest, unless it is stored already, and return its size in bytes.

        If the digest is stored and undamaged, the stored files stay. Otherwise the tensors are written in a fixed
        order, and if `original` has the uploaded adapter_config.json, that file is stored unchanged.
        """
        digest = adapter.weights.digest
        place = self._place(digest)
        self._pins.revive(digest)
        damaged = damaged_stat(place, digest)
        with self._locked():
            if matches_sidecar(place, damaged):
                return folder_size(place)

        def fill(temporary: Path) -> None:
            write(temporary, adapter)
            if original and CONFIG_NAME in original:
                write_synced(temporary / CONFIG_NAME, original[CONFIG_NAME])
            write_synced(temporary / SIDECAR_NAME, describe_sidecar(adapter.weights, temporary))
            sync(temporary)

        num_bytes = self._publish(place, fill, damaged)
        self.packed.add(adapter.weights)
        return num_bytes

    @contextmanager
    def publishing(
        self, adapter: PeftAdapter, in_use: InUse, original: Mapping[str, bytes] | None = None
    ) -> Iterator[int]:
        """Store the adapter as `put` does, and yield its size in bytes. The block commits a version of it.

        During the block no process can discard the bytes. If the block fails, they are discarded, unless
        `in_use(digest)` is true.
        """
        digest = adapter.weights.digest
        while True:
            num_bytes = self.put(adapter, original)
            if (hold := lock_folder(self._place(digest), fcntl.LOCK_SH)) is not None:
                break
        try:
            yield num_bytes
        except BaseException:
            os.close(hold)
            self.discard(digest, in_use)
            raise
        os.close(hold)

    def load(self, digest: str) -> LoraWeights:
        """Return the weights, mapped from the file without a copy. The digest isn't recomputed.

        The weights stay readable after a discard. Raise CorruptAdapter if the bytes are missing or inconsistent.
        """
        return load_weights(self._place(digest), digest)

    def num_bytes(self, digest: str) -> int:
        """Return the adapter's size on this machine's disk in bytes, or 0 if the disk doesn't have it."""
        try:
            return folder_size(self._place(digest))
        except OSError:
            return 0

    def read(self, digest: str, base: BaseShape) -> PeftAdapter:
        """Return the adapter with its configuration, validated like an upload.

        Raise CorruptAdapter if the bytes are missing or damaged, or don't fit the base model.
        """
        try:
            return self._read(digest, base)
        except (OSError, InvalidAdapter) as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def ranks(self, digest: str, base: BaseShape) -> dict[ModuleKey, int]:
        """Return the rank of each module according to the adapter's configuration. The tensors aren't read.

        Raise CorruptAdapter if the configuration is missing or damaged.
        """
        try:
            return read_ranks((self._place(digest) / CONFIG_NAME).read_bytes(), base)
        except (OSError, InvalidAdapter) as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def fits(self, digest: str, base: BaseShape) -> bool:
        """Return whether the adapter fits a base model of these shapes. Raise CorruptAdapter if it is damaged."""
        self.load(digest)  # raises if it is damaged, which says nothing about shapes
        try:
            self._read(digest, base)
        except InvalidAdapter:
            return False
        except OSError as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
        return True

    def _read(self, digest: str, base: BaseShape) -> PeftAdapter:
        place = self._place(digest)
        return read((place / CONFIG_NAME).read_bytes(), place / WEIGHTS_NAME, base)

    def verify(self, digest: str) -> None:
        """Read all bytes, and raise CorruptAdapter unless they are what was stored."""
        weights = self.load(digest)
        check_weights(self._place(digest), digest, weights)

    def verify_stored(self, digest: str) -> None:
        """Verify as `verify` does: not this machine's cached copy, but the bytes that all machines share."""
        if not self.is_whole(digest):
            state = "incomplete" if self._place(digest).exists() else "missing"
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is {state}")
        self.verify(digest)

    def open(self, digest: str) -> dict[str, BinaryIO]:
        """Open PEFT's two files, and return them by name. They stay readable after a discard.

        Raise CorruptAdapter if a file is missing or can't be opened.
        """
        place = self._place(digest)
        try:
            return open_all({name: place / name for name in (CONFIG_NAME, WEIGHTS_NAME)})
        except OSError as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def pin(self, digests: Iterable[str]) -> None:
        """Protect the bytes of each digest from deletion until `unpin`, even if `discard` is called.

        The bytes needn't be stored yet. A `discard` that has already begun may still remove them. To rule that
        out, call this first, and then look up a name that refers to the bytes.
        """
        self._pins.add(digests)

    def unpin(self, digests: Iterable[str]) -> None:
        """Undo one `pin` of each digest, and remove discarded bytes that aren't pinned any more.

        Raise OSError if the removal fails, or what `discard`'s argument `in_use` raises. The next sweep retries.
        """
        if (removal := self.let_go(digests)) is not None:
            removal()

    def let_go(self, digests: Iterable[str]) -> Callable[[], None] | None:
        """Undo one `pin` of each digest without blocking, for event loops.

        Return a function that removes discarded bytes, to call in a thread, or None if there are no such bytes.
        """
        doomed = self._pins.remove(digests)
        return partial(self._discard_all, doomed) if doomed else None

    def discard(self, digest: str, in_use: InUse = never) -> None:
        """Remove the bytes now or, if they are pinned, at the last `unpin`. Keep them if `in_use(digest)` is true.

        Pinned bytes also stay if `put` stores them again before the last `unpin`. Bytes that are being published
        stay; if the publication fails, the next sweep removes them. Discarding missing bytes is a no-op.
        """
        self._discard(digest, in_use)

    def doubt(self, digests: Iterable[str]) -> None:
        """Announce that versions of these digests will be deleted, and the bytes discarded afterwards.

        If this process is killed in between, a sweep can find the bytes. This is needed in a bucket only: a sweep
        of a directory finds all unwanted bytes, so this implementation does nothing.
        """

    def sweep(self, in_use: InUse) -> list[str]:
        """Discard bytes that killed processes left half-written or unpublished.

        `in_use` says which digests the catalog wants. Return the discarded digests.
        """
        with self._locked():
            for path in self._abandoned():
                delete_folders([path])
        self.packed.sweep()
        unwanted = [digest for digest in self._here() if not in_use(digest)]
        for digest in unwanted:
            self._discard(digest, in_use)
        return unwanted

    def digests(self) -> list[str]:
        """Return the digests of all stored adapters."""
        return self._here()

    def _here(self) -> list[str]:
        paths = self._root.glob("[0-9a-f][0-9a-f]/*")
        return sorted(path.name for path in paths if _DIGEST.fullmatch(path.name))

    def leftovers(self) -> list[str]:
        """Return the names of directories that killed processes left half-written or half-removed.

        `sweep` removes these directories.
        """
        with self._locked():
            return sorted(path.name for path in self._abandoned())

    def incomplete(self) -> list[str]:
        """Return the names, as "bytes/<digest>/<copy>", of incomplete copies in a bucket that no sweep removes.

        A directory has none: what is incomplete there is among the `leftovers`.
        """
        return []

    def is_whole(self, digest: str) -> bool:
        """Return whether the adapter is stored, and its files have their full sizes."""
        return matches_sidecar(self._place(digest))

    def is_being_published(self, digest: str) -> bool:
        """Return whether the bytes are stored, and a process is publishing them."""
        if (hold := lock_folder(self._place(digest), fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            os.close(hold)
            return False
        return self._place(digest).exists()

    def _discard(self, digest: str, in_use: InUse) -> None:
        if not self._pins.doom(digest, in_use):
            # the catalog is asked first: `Pins` says why
            freed = self._remove(digest, lambda _: in_use(digest) or self._pins.doom(digest, in_use))
            delete_folders(freed)

    def _discard_all(self, doomed: Mapping[str, InUse]) -> None:
        for digest, in_use in doomed.items():
            self._discard(digest, in_use)

    def _publish(self, place: Path, fill: Callable[[Path], None], damaged: os.stat_result | None = None) -> int:
        """Publish at `place` a directory that `fill` writes, unless an intact directory exists there by then.

        Return the size of the directory at `place` in bytes.
        """
        temporary, hold = self._temporary()
        leftovers = [temporary]
        try:
            fill(temporary)
            with self._locked():
                if matches_sidecar(place, damaged):  # another thread or process published it first
                    return folder_size(place)
                num_bytes = folder_size(temporary)
                leftovers += self._set_aside(place)
                place.parent.mkdir(exist_ok=True)
                temporary.rename(place)
                sync(place.parent)
                sync(self._root)
        finally:
            os.close(hold)
            delete_folders(leftovers)
        return num_bytes  # measured earlier: it may have been discarded by now

    def _remove(self, digest: str, is_kept: InUse) -> list[Path]:
        """Rename the directory, unless `is_kept(digest)` is true. Return the paths that remain to be deleted."""
        with self._locked():
            place = self._place(digest)
            hold = lock_folder(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if hold is None:  # missing, or being published
                return []
            try:
                return [] if is_kept(digest) else self._set_aside(place)
            finally:
                os.close(hold)

    def _set_aside(self, place: Path) -> list[Path]:
        aside = self._root / f"{TEMPORARY}{os.urandom(4).hex()}"  # renaming works on a full disk, too
        with suppress(FileNotFoundError):
            place.rename(aside)
            self.packed.remove(place.name)
            sync(place.parent)
        return [aside]

    def _temporary(self) -> tuple[Path, int]:
        """Create a directory to write in. Return its path and a lock, without which a sweep would delete it."""
        with self._locked():
            path = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._root))
            hold = lock_folder(path, fcntl.LOCK_SH)
        assert hold is not None
        return path, hold

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest is 64 hexadecimal digits")
        return self._root / digest[:2] / digest

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the root against other threads and processes, for a few file operations."""
        with open(self._root / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _abandoned(self) -> list[Path]:
        """Return the temporary directories that no process has locked.

        Call this under `_locked`, so that no directory is created meanwhile.
        """
        found = []
        for path in self._root.glob(f"{TEMPORARY}*"):
            if (hold := lock_folder(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                os.close(hold)
                found.append(path)
        return found
