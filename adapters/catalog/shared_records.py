"""The catalog's records in a bucket: the same keys as a directory has paths."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from adapters.catalog.records import FOLDER, PROJECTS, Read, Records, folder_of
from adapters.names import name_fault
from adapters.objects.bucket import Bucket, Missing
from adapters.viewpoint import DEFAULT_PROJECT, key_of, project_fault

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
