"""Folders of a store: locked, removed and measured.

Which bytes this process uses, and which of those go once it doesn't any more.

Event loops pin, so nothing here waits for a disk or a database. Nor does a pin wait for a discard of the same
bytes: they may go just after they were pinned, but not while a name means them. For whoever removes them asks for
names first, and then here, and nobody publishes the bytes in between. Who pins them before that keeps them; who
pins them later finds none of their names any more, and looks *after* having pinned (`adapters.library`).

smolora.json, which lies beside a stored adapter's files and makes loading quick.

It holds what would otherwise take PEFT's rules to work out, the modules and their effective scalings, and the
files' sizes, by which a directory that lost something is told from a whole one. Of the configuration, which is in
no adapter's digest, it holds the SHA-256.

The bytes of adapters: immutable directories named by digest, published by one rename.

    <root>/<digest[:2]>/<digest>/adapter_config.json          what PEFT reads; an upload's as the first had it
                                 adapter_model.safetensors
                                 smolora.json                 effective scalings and sizes, for quick loading
    <root>/packed/                                            `adapters.store.packed`
    <root>/names/                                             `adapters.catalog.records`
    <root>/.tmp-…                                             being written, or being removed

A directory is there whole or not at all, wherever a process is killed. Several processes may use one root. Which
digests are wanted is the catalog's to say, and processes race: so whoever publishes holds the bytes, by a lock on
their directory that ends with the process, until the version is committed (`publishing`); and nobody else removes
what is held, or what the catalog names at the last moment.
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
    """The handle of a lock on the directory, which closing it ends; None where it isn't there, or is another's."""
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
    """Remove files and folders, as far as that goes."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def folder_size(place: Path) -> int:
    """The bytes of the folder's files. Raises OSError."""
    return sum(path.stat().st_size for path in place.iterdir())


InUse = Callable[[str], bool]


class Pins:
    """Of one store's digests. Thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards both, for a moment: no call to elsewhere is made under it
        self._counts: Counter[str] = Counter()
        self._doomed: dict[str, InUse] = {}

    def __contains__(self, digest: str) -> bool:
        with self._mutex:
            return digest in self._counts

    def add(self, digests: Iterable[str]) -> None:
        """Pin each, once more where it is."""
        with self._mutex:
            self._counts.update(digests)

    def remove(self, digests: Iterable[str]) -> dict[str, InUse]:
        """Take back one `add` of each; those that were doomed and aren't pinned any more, to be discarded now."""
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
        """Whether it is pinned. Then the last `remove` returns it, unless `revive` comes before."""
        with self._mutex:
            if digest in self._counts:
                self._doomed[digest] = in_use
            return digest in self._counts

    def revive(self, digest: str) -> None:
        """It isn't doomed."""
        with self._mutex:
            self._doomed.pop(digest, None)


SIDECAR_NAME = "smolora.json"
FORMAT = 1


def describe_sidecar(weights: LoraWeights, directory: Path) -> bytes:
    """The sidecar of `weights`, whose two files are in `directory`."""
    sizes = {name: (directory / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME)}
    modules = [[key.layer, key.module, module.scaling] for key, module in weights.modules.items()]
    document = {"format": FORMAT, "digest": weights.digest, "sizes": sizes, "modules": modules}
    document["config"] = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    return json.dumps(document, separators=(",", ":")).encode()


def matches_sidecar(directory: Path, damaged: os.stat_result | None = None) -> bool:
    """Whether all files are there, in their full sizes, and it isn't the `damaged` directory."""
    try:
        sizes = json.loads((directory / SIDECAR_NAME).read_bytes())["sizes"]
        has_all = all((directory / name).stat().st_size == sizes[name] for name in (CONFIG_NAME, WEIGHTS_NAME))
        return has_all and not (damaged is not None and os.path.samestat(directory.stat(), damaged))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged_stat(directory: Path, digest: str) -> os.stat_result | None:
    """The directory, where it is there and isn't what was put: all of its bytes are read."""
    try:
        found = directory.stat()
        check_weights(directory, digest, load_weights(directory, digest))
        return None
    except CorruptAdapter:
        return found
    except OSError:
        return None


def load_weights(directory: Path, digest: str) -> LoraWeights:
    """The weights, mapped from the file. Raises CorruptAdapter if anything is missing or doesn't fit."""
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
    """Raises CorruptAdapter unless what was loaded has the digest, and the configuration beside it is that which
    was written with it, as far as the sidecar knows: older releases' don't.
    """
    if weights.digest != digest:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} no longer matches its digest")
    try:
        told = json.loads((directory / SIDECAR_NAME).read_bytes()).get("config")
        found = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
    if told not in (None, found):
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is damaged: its {CONFIG_NAME} was changed")


TEMPORARY = ".tmp-"

_DIGEST = re.compile(r"[0-9a-f]{64}")


def _never(digest: str) -> bool:
    return False


class AdapterStore:
    """The adapters under one root. Thread-safe; pins count within this process."""

    is_shared = False
    """Whether other machines read and write the same, so that nobody can know that nobody is at it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.packed = PackedFiles(root)
        self._root = root
        self._pins = Pins()

    def put(self, adapter: PeftAdapter, original: Mapping[str, bytes] | None = None) -> int:
        """Stores the adapter under its weights' digest, unless it is there already; returns the bytes stored.

        `original` may hold the adapter_config.json that was uploaded, which is kept as it is; the tensors are
        always written anew, the same bytes in our order. Of two with one digest, the first one's stay, undamaged.
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
        """`put`, for a block in which the version is committed: nobody discards the bytes meanwhile.

        Where the block fails they are discarded, unless `in_use(digest)` says that they are wanted all the same.
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
        """The weights, mapped from the file: quick, as nothing is copied and the digest isn't computed anew.

        They outlive a discard. Raises CorruptAdapter if the bytes are missing or don't fit together.
        """
        return load_weights(self._place(digest), digest)

    def num_bytes(self, digest: str) -> int:
        """That the adapter takes on this disk; 0 where it isn't there."""
        try:
            return folder_size(self._place(digest))
        except OSError:
            return 0

    def read(self, digest: str, base: BaseShape) -> PeftAdapter:
        """The adapter with its configuration, checked as an upload is. Raises CorruptAdapter."""
        try:
            return self._read(digest, base)
        except (OSError, InvalidAdapter) as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def ranks(self, digest: str, base: BaseShape) -> dict[ModuleKey, int]:
        """Return the rank of each module of the adapter, by its configuration. Raises CorruptAdapter."""
        try:
            return read_ranks((self._place(digest) / CONFIG_NAME).read_bytes(), base)
        except (OSError, InvalidAdapter) as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def fits(self, digest: str, base: BaseShape) -> bool:
        """Whether the adapter could be uploaded for a base of these shapes. Raises CorruptAdapter."""
        self.load(digest)  # or it is damaged, which says nothing about shapes
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
        """Reads all bytes and raises CorruptAdapter unless they are those that were put."""
        weights = self.load(digest)
        check_weights(self._place(digest), digest, weights)

    def verify_stored(self, digest: str) -> None:
        """The same of what all machines go by, where this one has a copy of its own."""
        self.verify(digest)

    def open(self, digest: str) -> dict[str, BinaryIO]:
        """PEFT's two files by name, to read and close; they outlive a discard. Raises CorruptAdapter."""
        place = self._place(digest)
        try:
            return open_all({name: place / name for name in (CONFIG_NAME, WEIGHTS_NAME)})
        except OSError as error:
            raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error

    def pin(self, digests: Iterable[str]) -> None:
        """Keeps the bytes of each until an `unpin`, whatever is discarded meanwhile; they needn't be there yet.

        Of a discard that has begun they may still go: a name that is found afterwards says that they don't.
        """
        self._pins.add(digests)

    def unpin(self, digests: Iterable[str]) -> None:
        """Takes back one `pin` of each; what was discarded meanwhile goes with its last one.

        Raises OSError, and what `in_use` of that discard raises: what is left then goes with the next sweep.
        """
        if (removal := self.let_go(digests)) is not None:
            removal()

    def let_go(self, digests: Iterable[str]) -> Callable[[], None] | None:
        """`unpin` without waiting, for event loops: what goes does so once a thread calls what is returned."""
        doomed = self._pins.remove(digests)
        return partial(self._discard_all, doomed) if doomed else None

    def discard(self, digest: str, in_use: InUse = _never) -> None:
        """Removes the bytes now, or at the last `unpin`, unless `in_use(digest)` then says that they are wanted.

        A `put` before then revives them, and what is about to be published stays: should that fail, until the next
        sweep. Discarding what isn't there does nothing.
        """
        self._discard(digest, in_use)

    def doubt(self, digests: Iterable[str]) -> None:
        """To be called before versions go whose digests are then discarded, so that a sweep finds the bytes should
        this process be killed in between. Of a directory's, it does anyway."""

    def sweep(self, in_use: InUse) -> list[str]:
        """Discards what nobody wants: left by killed processes, half-written or not published; the digests."""
        with self._locked():
            for path in self._abandoned():
                delete_folders([path])
        self.packed.sweep()
        unwanted = [digest for digest in self._here() if not in_use(digest)]
        for digest in unwanted:
            self._discard(digest, in_use)
        return unwanted

    def digests(self) -> list[str]:
        """Of all that is stored."""
        return self._here()

    def _here(self) -> list[str]:
        paths = self._root.glob("[0-9a-f][0-9a-f]/*")
        return sorted(path.name for path in paths if _DIGEST.fullmatch(path.name))

    def leftovers(self) -> list[str]:
        """The names of directories that killed processes left half-written or half-removed; `sweep` takes them."""
        with self._locked():
            return sorted(path.name for path in self._abandoned())

    def is_whole(self, digest: str) -> bool:
        """Whether the adapter is there, its files in their full sizes."""
        return matches_sidecar(self._place(digest))

    def is_held(self, digest: str) -> bool:
        """Whether somebody is about to publish the bytes, which are there."""
        if (hold := lock_folder(self._place(digest), fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            os.close(hold)
            return False
        return self._place(digest).exists()

    def _discard(self, digest: str, in_use: InUse) -> None:
        if not self._pins.doom(digest, in_use):
            # asked in this order: `adapters.store.store` says why
            freed = self._remove(digest, lambda _: in_use(digest) or self._pins.doom(digest, in_use))
            delete_folders(freed)

    def _discard_all(self, doomed: Mapping[str, InUse]) -> None:
        for digest, in_use in doomed.items():
            self._discard(digest, in_use)

    def _publish(self, place: Path, fill: Callable[[Path], None], damaged: os.stat_result | None = None) -> int:
        """Have the directory that `fill` writes appear, unless there is a whole one by then; its bytes."""
        temporary, hold = self._temporary()
        leftovers = [temporary]
        try:
            fill(temporary)
            with self._locked():
                if matches_sidecar(place, damaged):  # another thread or process was quicker
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
        return num_bytes  # counted before: by now somebody may have discarded it

    def _remove(self, digest: str, is_kept: InUse) -> list[Path]:
        """Moves the directory out of sight, unless it `is_kept`; what is returned remains to be deleted."""
        with self._locked():
            place = self._place(digest)
            hold = lock_folder(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if hold is None:  # not there, or somebody is about to name it
                return []
            try:
                return [] if is_kept(digest) else self._set_aside(place)
            finally:
                os.close(hold)

    def _set_aside(self, place: Path) -> list[Path]:
        aside = self._root / f"{TEMPORARY}{os.urandom(4).hex()}"  # which is to be had on a full disk, too
        with suppress(FileNotFoundError):
            place.rename(aside)
            self.packed.remove(place.name)
            sync(place.parent)
        return [aside]

    def _temporary(self) -> tuple[Path, int]:
        """A directory to write in, and the lock by which others see that it isn't abandoned."""
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
        """One process at a time; held for a few file operations only."""
        with open(self._root / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _abandoned(self) -> list[Path]:
        """Temporary directories that no process holds; call it locked, so that none is just being made."""
        found = []
        for path in self._root.glob(f"{TEMPORARY}*"):
            if (hold := lock_folder(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                os.close(hold)
                found.append(path)
        return found
