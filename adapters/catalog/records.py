"""A record of every version, beside the adapters' bytes: what the catalog is rebuilt from where it is lost.

    <root>/names/<name>/<version>.json        all that the catalog knows of the version, but for aliases
    <root>/names/<name>/next                  the number that comes next, where it can't be told from those
    <root>/projects/<project>/<name>/…        likewise, of projects other than `default`

A record is written before its version is committed, and removed after the version's deletion is. So what a client
was told is still true after a crash. An interrupted change may leave a record too many: `recovery.py` handles it.
Writers are within a transaction of the catalog, so there is one at a time.

The catalog's records in a bucket: the same keys as a directory has paths.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path

from adapters.catalog.versions import Part, Version
from adapters.names import DEFAULT_PROJECT, key_of, name_fault, project_fault, split_key
from adapters.storage.bucket import Bucket, Missing
from adapters.storage.durable import UNFINISHED, new_file, sync

FOLDER = "names"
PROJECTS = "projects"
FORMAT = 1
NEXT = "next"
_UNFINISHED = (f"{UNFINISHED}*", ".tmp-*")  # the latter by older releases
_TUPLES = ("target_modules", "warnings")

Read = Callable[[], bytes]
"""Reads a file. Raises OSError."""


@dataclass(frozen=True)
class Found:
    """Everything that the records say. `unreadable` names files, below the store's root.

    `next_versions` are by name: what comes next at the least, as far as it isn't told by the versions themselves.
    """

    versions: tuple[Version, ...]
    next_versions: Mapping[str, int]
    unreadable: tuple[str, ...]


class Records:
    """The records under the root of an `AdapterStore`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def reach(self, to_write: bool = True) -> None:
        """Raise BytesUnavailable where none can be removed just now or, `to_write`, written: before a transaction,
        in which all others who write would wait for that.
        """

    def write(self, version: Version) -> None:
        """Keep the version's record, in the place of any older one of its number."""
        self._keep(version.name, f"{version.version}.json", encode(version))

    def count_up(self, name: str, number: int) -> None:
        """Keep that the name's numbers below this one were given out."""
        self._keep(name, NEXT, b"%d" % number)

    def remove(self, name: str, numbers: list[int]) -> None:
        """Drop the records of these versions. That their numbers were given out stays known."""
        gone, next_number = self._leaving(name, numbers)
        if next_number is not None:
            self.count_up(name, next_number)
        if gone:
            self.forget(name, gone)

    def removal_writes(self, name: str, numbers: list[int]) -> bool:
        """Whether `remove` would write something as well, by what is there now. Raises BytesUnavailable."""
        return self._leaving(name, numbers)[1] is not None

    def forget(self, name: str, numbers: list[int]) -> None:
        """Drop the records of versions that never were."""
        self._drop(name, [f"{number}.json" for number in numbers])

    def read(self) -> Found:
        """All records, by name and number."""
        versions: list[Version] = []
        numbers: dict[str, int] = {}
        unreadable: list[str] = []
        for name, files in self._all():
            numbers[name] = _read_next(files.get(NEXT))
            records = ((number, file) for file in files if (number := _number(file)) is not None)
            for number, file in sorted(records):
                try:
                    version = decode(files[file]())
                    if (version.name, version.version) != (name, number):
                        raise ValueError("it is another's")
                    versions.append(version)
                except (OSError, ValueError, KeyError, TypeError):
                    unreadable.append(f"{folder_of(name)}/{file}")
        return Found(tuple(versions), numbers, tuple(unreadable))

    def clean(self) -> None:
        """Drop what killed writers left; only for one who knows that nobody is writing."""
        for pattern in _UNFINISHED:
            for _, place in self._places():
                for path in place.glob(pattern):
                    path.unlink(missing_ok=True)

    def _keep(self, name: str, file: str, content: bytes) -> None:
        with new_file(self._made(name) / file) as unfinished:
            unfinished.write_bytes(content)

    def _leaving(self, name: str, numbers: list[int]) -> tuple[list[int], int | None]:
        """Those of the versions that have records, and what to count up to, where nothing that stays tells it."""
        files = self._files(name)
        there = {number for file in files if (number := _number(file)) is not None}
        gone = [number for number in numbers if number in there]
        is_told = not gone or max(gone) < max(there) or _read_next(files.get(NEXT)) > max(gone)
        return gone, None if is_told else max(gone) + 1

    def _drop(self, name: str, files: list[str]) -> None:
        for file in files:
            (self._place(name) / file).unlink(missing_ok=True)
        sync(self._place(name))

    def _files(self, name: str) -> Mapping[str, Read]:
        """The name's files, to be read."""
        place = self._place(name)
        return {path.name: path.read_bytes for path in place.iterdir()} if place.is_dir() else {}

    def _all(self) -> Iterator[tuple[str, Mapping[str, Read]]]:
        """All names, with their files."""
        for name, _ in self._places():
            yield name, self._files(name)

    def _made(self, name: str) -> Path:
        """The name's folder, which is there from now on."""
        place = self._place(name)
        if not place.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            parent = place.parent
            while parent != self._root.parent:
                sync(parent)
                parent = parent.parent
        return place

    def _place(self, key: str) -> Path:
        return self._root / folder_of(key)

    def _places(self) -> list[tuple[str, Path]]:
        """All keys, with their folders."""
        projects = [(path.name, path) for path in _folders(self._root / PROJECTS) if not project_fault(path.name)]
        folders = [(DEFAULT_PROJECT, self._root / FOLDER), *projects]
        places = [(project, place) for project, folder in folders for place in _folders(folder)]
        return [(key_of(project, place.name), place) for project, place in places if not name_fault(place.name)]


class Recorder:
    """Writes records for one transaction, and knows which."""

    def __init__(self, records: Records) -> None:
        self.written: list[Version] = []
        self._records = records

    def write(self, version: Version) -> None:
        """As `Records.write`."""
        self.written.append(version)
        self._records.write(version)

    def forget(self, version: Version) -> None:
        """Drop the record of one that was not committed."""
        self._records.forget(version.name, [version.version])


def encode(version: Version) -> bytes:
    """The record of a version."""
    document = {"format": FORMAT, "kind": version.kind, **asdict(version)}
    return json.dumps(document | {"created_at": version.created_at.isoformat()}, indent=1).encode()


def decode(record: bytes) -> Version:
    """The inverse of `encode`. Raises ValueError, KeyError or TypeError where it is none."""
    document = json.loads(record)
    if document["format"] != FORMAT:
        raise ValueError("a format of another version of smolora")
    document.setdefault("key_id", None)  # of before there were keys
    values = {field.name: document[field.name] for field in fields(Version)}
    values |= {name: tuple(values[name]) for name in _TUPLES}
    values["parts"] = tuple(Part(**part) for part in values["parts"])
    values["created_at"] = datetime.fromisoformat(values["created_at"])
    return Version(**values)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def folder_of(key: str) -> str:
    """Where the key's records are, below the root."""
    project, name = split_key(key)
    return f"{FOLDER}/{name}" if project == DEFAULT_PROJECT else f"{PROJECTS}/{project}/{name}"


def _number(file: str) -> int | None:
    stem, _, ending = file.rpartition(".")
    return int(stem) if ending == "json" and stem.isdecimal() else None


def _read_next(read: Read | None) -> int:
    with suppress(OSError, ValueError):
        return 1 if read is None else int(read())
    return 1


_AT_ONCE = 16
_MAX_BYTES = 16 << 10  # of a record, more or less: one of 16 parts with a job's settings has half as many


class SharedRecords(Records):
    """As `Records`, for the machines that share a bucket; nothing of it is on their disks. Whatever asks it raises
    BytesUnavailable, in a transaction too: a version is published with its record, or not at all.
    """

    def __init__(self, root: Path, bucket: Bucket) -> None:
        super().__init__(root)
        self._bucket = bucket

    def reach(self, to_write: bool = True) -> None:
        if to_write:
            self._bucket.try_out(_MAX_BYTES)
        else:  # one that is full lets go of what it has
            self._bucket.delete(["reachable"])  # which never was there

    def clean(self) -> None:
        """There is nothing half-written."""

    def _keep(self, name: str, file: str, content: bytes) -> None:
        self._bucket.put(f"{folder_of(name)}/{file}", content)

    def _drop(self, name: str, files: list[str]) -> None:
        self._bucket.delete(f"{folder_of(name)}/{file}" for file in files)

    def _files(self, name: str) -> Mapping[str, Read]:
        place = f"{folder_of(name)}/"
        found = (stored.key for stored in self._bucket.listed(place))
        return {key.removeprefix(place): partial(self._read_key, key) for key in found}

    def _all(self) -> Iterator[tuple[str, Mapping[str, Read]]]:
        """All names with their files, which are read already: one request each, many at once."""
        keys = [stored.key for folder in (FOLDER, PROJECTS) for stored in self._bucket.listed(f"{folder}/")]
        with ThreadPoolExecutor(_AT_ONCE) as readers:
            contents = dict(zip(keys, readers.map(self._try, keys), strict=True))
        files: defaultdict[str, dict[str, Read]] = defaultdict(dict)
        for key, content in contents.items():
            parts = key.split("/")
            project = parts[1] if parts[0] == PROJECTS else DEFAULT_PROJECT
            name, file = parts[-2:]
            if content is not None and not project_fault(project) and not name_fault(name):
                files[key_of(project, name)][file] = partial(bytes, content)
        yield from sorted(files.items())

    def _read_key(self, key: str) -> bytes:
        if (content := self._try(key)) is None:
            raise FileNotFoundError(key)
        return content

    def _try(self, key: str) -> bytes | None:
        """None where it has gone since it was listed."""
        try:
            return self._bucket.get(key)
        except Missing:
            return None
