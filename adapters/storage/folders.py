"""Immutable folders by name, each whole or absent: in a directory, or in a bucket that many machines use.

A folder is whole once it has its mark, the file that is written last.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from adapters.storage.blobs import Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import (
    ABANDONED_AFTER,
    UNFINISHED,
    new_directory,
    new_file,
    remove_abandoned,
    remove_directory,
)

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

_PIECE = 1 << 20
_MAX_REMEMBERED = 10_000

Document = Mapping[str, object]
Read = Callable[[], Document]
"""Returns the JSON object in a folder's mark (the file that is written last).

Raises FileNotFoundError if the mark is missing, OSError if it can't be read, or ValueError if it isn't valid.
"""


class Folders:
    """The folders below one root, which needn't exist yet. Thread-safe; several processes may use one root.

    `mark` is the name of the file that is written last.
    """

    def __init__(self, root: Path, mark: str) -> None:
        self._root = root
        self._mark = mark

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """Yield a temporary directory to fill. On leaving, store it, unless a folder of that name exists by then.

        Raise OSError if the disk fails.
        """
        with new_directory(self._root / name) as directory:
            yield directory

    @contextmanager
    def renewed(self, name: str) -> Iterator[Path]:
        """Yield a temporary directory to fill. On leaving, its files replace those of the damaged folder `name`.

        Raise OSError if the disk fails.
        """
        place = self._root / name
        with self._draft(name) as directory:
            yield directory
            place.mkdir(exist_ok=True)
            for path in sorted(directory.iterdir(), key=lambda path: path.name == self._mark):
                with new_file(place / path.name) as file:
                    path.replace(file)

    def open(self, name: str, file: str) -> BinaryIO:
        """Open one of the folder's files. An open file stays readable after the folder is deleted.

        Raise FileNotFoundError if there is no such file.
        """
        return (self._root / name / file).open("rb")

    def digest(self, name: str, file: str) -> str:
        """Return the SHA-256 of one of the folder's files, in hexadecimal digits.

        Raise FileNotFoundError if there is no such file, or OSError if it can't be read.
        """
        digest = hashlib.sha256()
        with self.open(name, file) as opened:
            for piece in iter(partial(opened.read, _PIECE), b""):
                digest.update(piece)
        return digest.hexdigest()

    def read(self, name: str) -> Document:
        """Return the JSON object in the folder's mark.

        Raise FileNotFoundError if it is missing, OSError if it can't be read, or ValueError if it isn't valid.
        """
        return _parsed((self._root / name / self._mark).read_bytes())

    def all(self) -> Mapping[str, Read]:
        """Return all folders by name, damaged ones included, each with the function that reads its mark."""
        if not self._root.is_dir():
            return {}
        names = [path.name for path in self._root.iterdir() if not path.name.startswith(UNFINISHED)]
        return {name: partial(self.read, name) for name in names if self.has(name)}

    def has(self, name: str) -> bool:
        """Return whether the folder exists, even if it is damaged."""
        try:
            return (self._root / name).is_dir()
        except OSError:  # the disk is damaged
            return True

    def present(self, names: set[str]) -> set[str]:
        """Return the names whose folders exist, even if the folders are damaged."""
        return set(filter(self.has, names))

    def delete(self, name: str) -> None:
        """Delete the folder. Its open files stay readable. Raise FileNotFoundError if it doesn't exist."""
        remove_directory(self._root / name)

    def clean(self) -> None:
        """Remove unfinished directories of killed processes that are older than ABANDONED_AFTER."""
        remove_abandoned(self._root)

    @contextmanager
    def _draft(self, name: str) -> Iterator[Path]:
        """Yield a temporary directory below the root, which is removed on leaving."""
        self._root.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{name}-", dir=self._root))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


class BucketFolders(Folders):
    """The folders in a bucket, as `Copies` keeps them. All methods raise BytesUnavailable if the bucket fails.

    The local root has only the files that are being written or read. If two machines stored a folder at once,
    there are two copies, and all machines read the older one.
    """

    def __init__(self, root: Path, mark: str, bucket: "Bucket") -> None:
        super().__init__(root, mark)
        self._bucket = bucket
        self._copies = Copies(bucket, mark)
        self._remembered: dict[tuple[str, str], Document] = {}  # marks, by folder and copy: no copy ever changes

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        with self._draft(name) as directory:
            yield directory
            if not self.has(name):
                self._copies.push(name, directory)

    @contextmanager
    def renewed(self, name: str) -> Iterator[Path]:
        damaged = self._copies.whole(name)
        with self._draft(name) as directory:
            yield directory
            self._copies.push(name, directory)
        self._copies.remove(damaged)

    def open(self, name: str, file: str) -> BinaryIO:
        stored = self._copy(name).files.get(file)
        if stored is None:
            raise FileNotFoundError(name)
        self._root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            unnamed = opened.enter_context(tempfile.TemporaryFile(dir=self._root))
            with _found(name):
                self._bucket.copy_to(stored, cast("BinaryIO", unnamed))
            unnamed.seek(0)
            opened.pop_all()
            return cast("BinaryIO", unnamed)

    def digest(self, name: str, file: str) -> str:
        stored = self._copy(name).files.get(file)
        if stored is None:
            raise FileNotFoundError(name)
        with _found(name):
            return self._bucket.digest(stored)

    def read(self, name: str) -> Document:
        return self._read(self._copy(name))

    def all(self) -> Mapping[str, Read]:
        found: dict[str, Read] = {}
        for copy in self._copies.all():
            if copy.is_whole:
                found.setdefault(copy.folder, partial(self._read, copy))
        return found

    def has(self, name: str) -> bool:
        return bool(self._copies.whole(name))

    def present(self, names: set[str]) -> set[str]:
        """Return the names whose folders exist, even if the folders are damaged.

        For several names, all folders are listed once.
        """
        return names & self.all().keys() if len(names) > 1 else super().present(names)

    def delete(self, name: str) -> None:
        copies = self._copies.of(name)
        if not any(copy.is_whole for copy in copies):
            raise FileNotFoundError(name)
        self._copies.remove(copies)

    def clean(self) -> None:
        """Remove unfinished local directories and incomplete uploads that are older than ABANDONED_AFTER."""
        super().clean()
        before = self._bucket.now() - timedelta(seconds=ABANDONED_AFTER)
        self._copies.remove(c for c in self._copies.all() if not c.is_whole and c.modified < before)

    def _copy(self, name: str) -> Copy:
        copies = self._copies.whole(name)
        if not copies:
            raise FileNotFoundError(name)
        return copies[0]

    def _read(self, copy: Copy) -> Document:
        key = (copy.folder, copy.id)
        if (document := self._remembered.get(key)) is None:
            with _found(copy.folder):
                document = _parsed(self._copies.read(copy, self._mark))
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = document
        return document


def _parsed(content: bytes) -> Document:
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Raise FileNotFoundError if the block raises Missing: a listed file was deleted meanwhile."""
    try:
        yield
    except Missing:
        raise FileNotFoundError(name) from None
