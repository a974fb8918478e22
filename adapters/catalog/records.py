"""A record of every version, beside the adapters' bytes: what the catalog is rebuilt from where it is lost.

    <root>/names/<name>/<version>.json        all that the catalog knows of the version, but for aliases
    <root>/names/<name>/next                  the number that comes next, where it can't be told from those
    <root>/projects/<project>/<name>/…        likewise, of projects other than `default`

A record is written before its version is committed, and removed after the version's deletion is. So what a client
was told is still true after a crash. An interrupted change may leave a record too many: `recovery.py` handles it.
Writers are within a transaction of the catalog, so there is one at a time.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from adapters.catalog.versions import Part, Version
from adapters.durable import UNFINISHED, new_file, sync
from adapters.names import name_fault
from adapters.viewpoint import DEFAULT_PROJECT, key_of, project_fault, split_key

FOLDER = "names"
PROJECTS = "projects"
FORMAT = 1
_NEXT = "next"
_UNFINISHED = (f"{UNFINISHED}*", ".tmp-*")  # the latter by older releases
_TUPLES = ("target_modules", "warnings")


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

    def write(self, version: Version) -> None:
        """Keep the version's record, in the place of any older one of its number."""
        with new_file(self._made(version.name) / f"{version.version}.json") as unfinished:
            unfinished.write_bytes(encode(version))

    def count_up(self, name: str, number: int) -> None:
        """Keep that the name's numbers below this one were given out."""
        with new_file(self._made(name) / _NEXT) as unfinished:
            unfinished.write_bytes(b"%d" % number)

    def remove(self, name: str, numbers: list[int]) -> None:
        """Drop the records of these versions. That their numbers were given out stays known."""
        place = self._place(name)
        there = [number for path in place.glob("*.json") if (number := _number(path)) is not None]
        gone = [number for number in numbers if number in there]
        if not gone:
            return
        if max(gone) == max(there) and _read_next(place) <= max(gone):
            self.count_up(name, max(gone) + 1)
        self.forget(name, gone)

    def forget(self, name: str, numbers: list[int]) -> None:
        """Drop the records of versions that never were."""
        for number in numbers:
            (self._place(name) / f"{number}.json").unlink(missing_ok=True)
        sync(self._place(name))

    def read(self) -> Found:
        """All records, by name and number."""
        versions: list[Version] = []
        numbers: dict[str, int] = {}
        unreadable: list[str] = []
        for name, place in self._places():
            numbers[name] = _read_next(place)
            paths = ((number, path) for path in place.glob("*.json") if (number := _number(path)) is not None)
            for number, path in sorted(paths):
                try:
                    version = decode(path.read_bytes())
                    if (version.name, version.version) != (name, number):
                        raise ValueError("it is another's")
                    versions.append(version)
                except (OSError, ValueError, KeyError, TypeError):
                    unreadable.append(str(path.relative_to(self._root)))
        return Found(tuple(versions), numbers, tuple(unreadable))

    def clean(self) -> None:
        """Drop what killed writers left; only for one who knows that nobody is writing."""
        for pattern in _UNFINISHED:
            for _, place in self._places():
                for path in place.glob(pattern):
                    path.unlink(missing_ok=True)

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
        project, name = split_key(key)
        return self._root / FOLDER / name if project == DEFAULT_PROJECT else self._root / PROJECTS / project / name

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


def _number(path: Path) -> int | None:
    return int(path.stem) if path.stem.isdecimal() else None


def _read_next(place: Path) -> int:
    with suppress(OSError, ValueError):
        return int((place / _NEXT).read_bytes())
    return 1
