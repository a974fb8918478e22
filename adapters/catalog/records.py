"""Records of all versions: small JSON files from which a lost catalog is rebuilt.

    names/<name>/<version>.json        all that the catalog knows of the version, except aliases
    names/<name>/next                  the next version's number, if it isn't the highest record's plus one
    projects/<project>/<name>/...      the same files for projects other than `default`

The records are stored next to the adapters' bytes, below HOME/adapters, or under the same keys in a bucket. A
record is written before its version is committed, and removed after the version's deletion is committed. So a
crash loses no change that was reported to a client. An interrupted change may leave an extra record, which
`recovery.py` handles. Every writer is in a transaction of the catalog, so there is one writer at a time.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog.versions import Part, Version
from adapters.names import DEFAULT_PROJECT, key_of, name_fault, project_fault, split_key
from adapters.storage.blobs import Blobs, Directory, Missing

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

FOLDER = "names"
PROJECTS = "projects"
FORMAT = 1
NEXT = "next"
_TUPLES = ("target_modules", "warnings")
_AT_ONCE = 16  # records that are read concurrently, since each read from a bucket takes a while
_MAX_BYTES = 16 << 10  # about twice as much as a record of 16 parts with a job's settings takes


@dataclass(frozen=True)
class Found:
    """The content of all records. `unreadable` has the paths of damaged records, relative to the root or bucket.

    `next_versions` has, by name, the content of the file `next`: the lowest number that a new version may get.
    """

    versions: tuple[Version, ...]
    next_versions: Mapping[str, int]
    unreadable: tuple[str, ...]


class Records:
    """The records of versions: in the bucket if there is one, otherwise below an `AdapterStore`'s root.

    With a bucket, every method raises BytesUnavailable if the bucket fails, even within a transaction: a version
    is published with its record, or not at all.
    """

    def __init__(self, root: Path, bucket: "Bucket | None" = None) -> None:
        self._blobs: Blobs = Directory(root) if bucket is None else bucket

    def reach(self, to_write: bool = True) -> None:
        """Raise BytesUnavailable if records can't be removed now or, with `to_write`, can't be written.

        Call this before a transaction: within a transaction, all other writers would wait for the bucket's answer.
        """
        self._blobs.reach(_MAX_BYTES if to_write else 0)

    def write(self, version: Version) -> None:
        """Store the version's record, replacing any older record with the same name and number."""
        self._blobs.put(f"{folder_of(version.name)}/{version.version}.json", encode(version))

    def count_up(self, name: str, number: int) -> None:
        """Record that the name's version numbers below `number` have been used."""
        self._blobs.put(f"{folder_of(name)}/{NEXT}", b"%d" % number)

    def remove(self, name: str, numbers: list[int]) -> None:
        """Remove the versions' records, but remember that their numbers have been used."""
        gone, next_number = self._leaving(name, numbers)
        if next_number is not None:
            self.count_up(name, next_number)
        if gone:
            self.forget(name, gone)

    def removal_writes(self, name: str, numbers: list[int]) -> bool:
        """Return whether `remove`, if called now, would have to write the file `next`."""
        return self._leaving(name, numbers)[1] is not None

    def forget(self, name: str, numbers: list[int]) -> None:
        """Remove the records of versions that were never committed."""
        self._blobs.delete(f"{folder_of(name)}/{number}.json" for number in numbers)

    def forget_project(self, project: str) -> None:
        """Remove all records of a project that is being deleted, and the numbers that its versions have used.

        Call this before the deletion's transaction is committed. If it isn't, `recover` writes the numbers again.
        """
        self._blobs.delete(self._blobs.keys(f"{PROJECTS}/{project}/"))

    def read(self) -> Found:
        """Return the content of all records, ordered by name and number."""
        keys = [key for folder in (FOLDER, PROJECTS) for key in self._blobs.keys(f"{folder}/")]
        places = sorted(place for key in keys if (place := _place_of(key)) is not None)
        versions: list[Version] = []
        next_versions: dict[str, int] = {}
        unreadable: list[str] = []
        with ThreadPoolExecutor(_AT_ONCE) as readers:
            contents = readers.map(self._try, [key for _, _, key in places])
            for (name, number, key), content in zip(places, contents, strict=True):
                if number == 0:
                    next_versions[name] = _next_in(content)
                elif content is not None:
                    try:
                        version = decode(content)
                        if (version.name, version.version) != (name, number):
                            raise ValueError("a record of another version")
                        versions.append(version)
                    except (ValueError, KeyError, TypeError):
                        unreadable.append(key)
        return Found(tuple(versions), next_versions, tuple(unreadable))

    def clean(self) -> None:
        """Remove the files that killed writers left. Call this only if nothing else can be writing."""
        for folder in (FOLDER, PROJECTS):
            self._blobs.clean(f"{folder}/")

    def _leaving(self, name: str, numbers: list[int]) -> tuple[list[int], int | None]:
        """Return which of the versions have records, and the number to write to `next` before these are removed.

        The number is None if the file `next` needn't be written: a version with a higher number keeps its record,
        or the file already has a number above those of the removed records.
        """
        files = [key.rpartition("/")[2] for key in self._blobs.keys(f"{folder_of(name)}/")]
        there = {number for file in files if (number := _number(file)) is not None}
        gone = [number for number in numbers if number in there]
        if not gone or max(gone) < max(there):
            return gone, None
        next_number = _next_in(self._try(f"{folder_of(name)}/{NEXT}")) if NEXT in files else 1
        return gone, None if next_number > max(gone) else max(gone) + 1

    def _try(self, key: str) -> bytes | None:
        """Return the file's content, b"" if it can't be read, or None if the file was removed meanwhile."""
        try:
            return self._blobs.get(key)
        except Missing:
            return None
        except OSError:
            return b""


class Recorder:
    """Writes records of the versions that one transaction publishes, and lists these versions in `written`."""

    def __init__(self, records: Records) -> None:
        self.written: list[Version] = []
        self._records = records

    def write(self, version: Version) -> None:
        self.written.append(version)
        self._records.write(version)

    def forget(self, version: Version) -> None:
        """Remove the record of a version that was not committed."""
        self._records.forget(version.name, [version.version])


def encode(version: Version) -> bytes:
    """Return the version's record."""
    document = {"format": FORMAT, "kind": version.kind, **asdict(version)}
    return json.dumps(document | {"created_at": version.created_at.isoformat()}, indent=1).encode()


def decode(record: bytes) -> Version:
    """Return the version in a record. Raise ValueError, KeyError or TypeError if the record is invalid."""
    document = json.loads(record)
    if document["format"] != FORMAT:
        raise ValueError("a format of another version of smolora")
    values = {field.name: document[field.name] for field in fields(Version)}
    values |= {name: tuple(values[name]) for name in _TUPLES}
    values["parts"] = tuple(Part(**part) for part in values["parts"])
    values["created_at"] = datetime.fromisoformat(values["created_at"])
    return Version(**values)


def folder_of(key: str) -> str:
    """Return the folder, as a path below the root, with the records of the adapter that has this key."""
    project, name = split_key(key)
    return f"{FOLDER}/{name}" if project == DEFAULT_PROJECT else f"{PROJECTS}/{project}/{name}"


def _place_of(key: str) -> tuple[str, int, str] | None:
    """Return the adapter's key, the version's number and the path, for the record whose path is `key`.

    The number is 0 for the file `next`. Return None if `key` isn't the path of a record.
    """
    folder, *parts = key.split("/")
    if folder == FOLDER:
        parts = [DEFAULT_PROJECT, *parts]
    if len(parts) != 3 or project_fault(parts[0]) or name_fault(parts[1]):
        return None
    number = 0 if parts[2] == NEXT else _number(parts[2])
    return None if number is None else (key_of(parts[0], parts[1]), number, key)


def _number(file: str) -> int | None:
    stem, _, ending = file.rpartition(".")
    return int(stem) if ending == "json" and stem.isdecimal() else None


def _next_in(content: bytes | None) -> int:
    try:
        return int(content or b"1")
    except ValueError:
        return 1
