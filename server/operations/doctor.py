"""Checks everything that is stored under a HOME byte by byte, and rebuilds the catalog if the database is lost.

`examine` changes nothing, and may run while a server runs. While `rebuild` runs, no other process may have the
database open. It creates a new database only if the old one is missing or damaged, and renames a damaged
database's files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog.catalog import Catalog, Version
from adapters.catalog.records import Records
from adapters.catalog.recovery import Recovered
from adapters.errors import CorruptAdapter
from adapters.names import Viewpoint
from adapters.store.store import AdapterStore
from server.database import build_of, connect, faults, nobody_has_it_open, set_aside
from server.errors import StartupError
from server.jobs.files import JobFiles
from server.jobs.jobs import Jobs
from server.model.packed_adapters import is_damaged
from server.storage.home import Home, serving
from server.storage.places import Storage
from server.system.messages import plural
from server.training.files import checked_uploads

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

_REMOVED = "the server's next start removes it"
_REPAIRED = "the server's next start repairs it"
_PACKED = (
    "changed since it was written, and servers read it: delete it and restart the server, which makes it again"
)


@dataclass(frozen=True)
class Finding:
    """A fault that `examine` found."""

    about: str  # such as "tweets@3" or "database"
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found in a HOME: its faults, and how much was checked."""

    findings: tuple[Finding, ...]
    num_versions: int
    num_adapters: int  # directories with bytes, whose digests were recomputed
    num_uploads: int  # data sets and files, all of whose bytes were read
    database: str | None  # SQLite's release and kind of journal; None if it couldn't be opened

    @property
    def is_sound(self) -> bool:
        return not self.findings

    def line(self) -> str:
        """Return a line of text that says how many faults were found and how much was checked."""
        verdict = "sound" if self.is_sound else plural(len(self.findings), "finding")
        versions, adapters = plural(self.num_versions, "version"), plural(self.num_adapters, "stored adapter")
        return f"{verdict}: {versions}, {adapters}, {plural(self.num_uploads, 'upload')} checked"


@dataclass(frozen=True)
class Rebuilt:
    """What `rebuild` recovered, and what it couldn't.

    `set_aside` are the new names of the damaged database's files. `lost_jobs` are the ids of lost jobs, as far as
    files or versions name these jobs. `models` are the paths below HOME of models that full fine-tuning made
    in those jobs.
    """

    is_new: bool  # a new database was made; else the old one was sound
    set_aside: tuple[str, ...]
    recovered: Recovered
    lost_jobs: tuple[str, ...]
    models: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text."""
        if not self.is_new:
            yield "the database is sound: it was kept, with all aliases and jobs"
            yield from self.recovered.lines()
            return
        if self.set_aside:
            yield f"the damaged database was renamed to {self.set_aside[0]}"
        yield f"published again from the directories: {', '.join(self.recovered.adopted) or 'nothing'}"
        if self.recovered.lost:
            yield f"lost, as bytes or parts are missing or damaged: {', '.join(self.recovered.lost)}"
        yield "lost: all aliases; latest is each name's highest version, even if it was moved back"
        yield "lost: all API keys, limits and usage, and which adapters were public: make new keys"
        yield f"lost: all jobs, their events and reports: {', '.join(self.lost_jobs) or 'none left a trace'}"
        if self.models:
            yield f"models of full fine-tuning are kept until you remove them: {', '.join(self.models)}"


def examine(home: Path, bucket: "Bucket | None" = None, *, with_uploads: bool = True) -> Diagnosis:
    """Check everything that is stored. Without `with_uploads`, leave out data sets and files.

    Raise StartupError if there is no such HOME, or if a newer release wrote its database.
    """
    storage = Storage(Home(home), bucket)
    _check_home(storage)
    store, records = storage.adapters(), storage.records()
    findings = [Finding("database", fault) for fault in faults(home)]
    damaged = _damaged(store)
    versions: list[Version] = []
    database = None
    if not findings:
        engine = connect(home)
        database = str(build_of(engine))
        catalog, jobs = Catalog(engine, of=Viewpoint(sees_all=True)), Jobs(engine)
        versions = [version for adapter in catalog.list() for version in adapter.versions]
        stored = set(store.digests())
        findings += _of_versions(versions, stored, damaged)
        findings += _of_records(versions, records)
        named = {version.digest for version in versions}
        findings += [
            Finding(f"adapters/{digest[:2]}/{digest}", f"nothing names these bytes; {_REMOVED}")
            for digest in sorted(stored - named)
            if not (store.is_being_published(digest) or catalog.in_use(digest) or jobs.in_use(digest))
        ]
        engine.dispose()
    else:
        findings += [Finding(digest, message) for digest, message in damaged.items()]
    findings += [
        Finding(f"adapters/packed/{digest}", _PACKED)
        for digest, file in store.packed.contents()
        if is_damaged(file)
    ]
    findings += [
        Finding(f"adapters/{name}", f"left by a process that was killed; {_REMOVED}") for name in store.leftovers()
    ]
    uploads = dict(checked_uploads(storage)) if with_uploads else {}
    findings += [Finding(place, message) for place, message in uploads.items() if message is not None]
    return Diagnosis(tuple(findings), len(versions), len(store.digests()), len(uploads), database)


def rebuild(home: Path, bucket: "Bucket | None" = None) -> Rebuilt:
    """Recover the catalog from the stored adapters, in a new database if the old one is missing or damaged.

    Raise StartupError if there is no such HOME, or if another process uses it.
    """
    storage = Storage(Home(home), bucket)
    _check_home(storage)
    with serving(home):  # no server may start meanwhile
        return _rebuild(storage)


def _rebuild(storage: Storage) -> Rebuilt:
    home = storage.home.path
    with nobody_has_it_open(home):
        is_new = bool(faults(home))
        moved = set_aside(home) if is_new else []
    store, records = storage.adapters(), storage.records()
    damaged = _damaged(store)
    whole = set(store.digests()) - damaged.keys()
    engine = connect(home)
    catalog = Catalog(engine, records)
    found = catalog.recover(whole.__contains__, Jobs(engine).is_known)
    store.doubt(digest for digest in whole if not catalog.in_use(digest))
    lost_jobs = {version.job_id for version in records.read().versions if version.job_id is not None}
    files = JobFiles(home, storage.bucket)
    lost_jobs |= {name for name in files.stored() if name.startswith("job-")}
    engine.dispose()
    lost = sorted(lost_jobs) if is_new else []
    models = [files.model(job_id).relative_to(home).as_posix() for job_id in lost if files.model(job_id).is_dir()]
    return Rebuilt(is_new, tuple(moved), found, tuple(lost), tuple(models))


def _check_home(storage: Storage) -> None:
    home = storage.home.path
    if storage.bucket is not None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not storage.home.adapters.is_dir():
        raise StartupError(f"{home} isn't a server's home: it has no folder adapters; give --home or SMOLORA_HOME")


def _damaged(store: AdapterStore) -> dict[str, str]:
    """Return a message for each damaged adapter in the store, by digest."""
    found = {}
    for digest in store.digests():
        try:
            if not store.is_whole(digest):
                raise CorruptAdapter(f"the stored adapter {digest[:12]} is incomplete")
            store.verify_stored(digest)
        except CorruptAdapter as error:
            found[digest] = str(error)
    return found


def _of_versions(versions: list[Version], stored: set[str], damaged: dict[str, str]) -> Iterator[Finding]:
    listed = {(version.name, version.version): version for version in versions}
    for version in versions:
        name = f"{version.name}@{version.version}"
        for part in version.parts:
            if (of := listed.get((part.name, part.version))) is None or of.digest != part.digest:
                yield Finding(name, f"its part {part.name}@{part.version} is missing, or has other bytes")
        if version.parts:
            continue
        if version.digest in damaged:
            yield Finding(name, damaged[version.digest])
        elif version.digest not in stored:
            yield Finding(name, f"the stored adapter {version.digest[:12]} is missing")


def _of_records(versions: list[Version], records: Records) -> Iterator[Finding]:
    """Yield the differences between the catalog's versions and the JSON files that record them.

    A version that is being published may show up as an extra record.
    """
    found = records.read()
    recorded = {(version.name, version.version): version for version in found.versions}
    listed = {(version.name, version.version): version for version in versions}
    for path in found.unreadable:
        yield Finding(f"adapters/{path}", f"this record is unreadable; {_REPAIRED}")
    for (name, number), version in listed.items():
        if recorded.get((name, number)) != version:
            yield Finding(f"{name}@{number}", f"its record is missing or differs; {_REPAIRED}")
    for name, number in sorted(recorded.keys() - listed.keys()):
        yield Finding(f"{name}@{number}", f"has a record, but isn't in the database; {_REPAIRED}")
