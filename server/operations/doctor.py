"""Checks everything that is stored byte by byte, and rebuilds the catalog if the database is lost.

The database is in HOME or on a PostgreSQL server, and the bytes are in HOME or in a bucket. `examine` changes
nothing, except that it migrates an older database. It may run while servers run. While `rebuild` runs, no other
process may have the database open. It creates a new database only if the old one, in HOME, is missing or damaged,
and renames a damaged database's files. With PostgreSQL, an empty database is filled.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalog import tables as catalog_tables
from adapters.catalog.catalog import Catalog, Version
from adapters.catalog.records import Records
from adapters.catalog.recovery import Recovered
from adapters.errors import CorruptAdapter
from adapters.names import Viewpoint
from adapters.store.store import AdapterStore
from server.access import tables as access
from server.database import (
    as_startup_error,
    connect,
    described,
    faults,
    nobody_has_it_open,
    refuse_in_use,
    set_aside,
)
from server.database.rows import row_faults
from server.errors import StartupError
from server.jobs import tables as queue
from server.jobs.files import JobFiles
from server.jobs.jobs import Jobs
from server.model.packed_adapters import is_damaged
from server.storage.home import Home, serving
from server.storage.places import Storage
from server.system.messages import plural
from server.training.files import checked_uploads

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

TABLES = [
    table
    for metadata in (catalog_tables.metadata, access.metadata, queue.metadata)
    for table in metadata.sorted_tables
    if table is not access.changes  # a counter of the database itself
]
"""All tables with rows of people and jobs, in an order in which they can be filled."""

_REMOVED = "the server's next start removes it"
_REPAIRED = "the server's next start repairs it"
_BY_REBUILD = "stop all servers and workers, and run smolora doctor --rebuild"
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
    """What `examine` found: faults, and how much was checked."""

    findings: tuple[Finding, ...]
    num_versions: int
    num_adapters: int  # directories with bytes, whose digests were recomputed
    num_uploads: int  # data sets and files, all of whose bytes were read
    database: str | None  # its software and release; None if it couldn't be opened

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

    is_new: bool  # a new or empty database was filled; else the old one was sound
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


def examine(
    home: Path, bucket: "Bucket | None" = None, url: str | None = None, *, with_uploads: bool = True
) -> Diagnosis:
    """Check everything that is stored, and the database at `url` or, if that is None, in HOME.

    Without `with_uploads`, leave out data sets and files. Raise StartupError if there is no such HOME, if a newer
    release wrote the database, or if PostgreSQL or the bucket can't be reached.
    """
    storage = Storage(Home(home), bucket)
    _check_home(storage)
    with as_startup_error(home):
        return _examine(storage, url, with_uploads)


def _examine(storage: Storage, url: str | None, with_uploads: bool) -> Diagnosis:
    home, store = storage.home.path, storage.adapters()
    findings = [Finding("database", fault) for fault in (faults(home) if url is None else _faults_at(home, url))]
    damaged = _damaged(store, store.digests())
    versions: list[Version] = []
    database = None
    if not findings:
        engine = connect(home, url=url)
        try:
            database = described(engine)
            catalog, jobs = Catalog(engine, of=Viewpoint(sees_all=True)), Jobs(engine)
            versions = [version for adapter in catalog.list() for version in adapter.versions]
            named = {version.digest for version in versions if not version.parts}
            stored = set(store.digests())
            damaged |= _damaged(store, named - stored)
            damaged = {digest: message for digest, message in damaged.items() if catalog.in_use(digest)}
            findings += _of_versions(versions, damaged)
            if (records := _records(storage, url)) is not None:
                findings += _of_records(versions, records, _repaired(storage))
            findings += [
                Finding(f"adapters/{digest[:2]}/{digest}", f"nothing names these bytes; {_removed(storage)}")
                for digest in sorted(stored - named)
                if not (store.is_being_published(digest) or catalog.in_use(digest) or jobs.in_use(digest))
            ]
        finally:
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
    findings += [
        Finding(f"adapters/{name}", f"an incomplete copy; {_removed(storage)}") for name in store.incomplete()
    ]
    uploads = dict(checked_uploads(storage)) if with_uploads else {}
    findings += [Finding(place, message) for place, message in uploads.items() if message is not None]
    return Diagnosis(tuple(findings), len(versions), len(store.digests()), len(uploads), database)


def rebuild(home: Path, bucket: "Bucket | None" = None, url: str | None = None) -> Rebuilt:
    """Recover the catalog from the stored adapters, in a new database if the old one is missing or damaged.

    `url` names a database on a PostgreSQL server, and needs a bucket, since only a bucket has records then. Raise
    StartupError if there is no such HOME, if another process uses it or that database, or if PostgreSQL or the
    bucket can't be reached.
    """
    storage = Storage(Home(home), bucket)
    _check_home(storage)
    with serving(home), as_startup_error(home):  # no server may start meanwhile
        return _rebuild(storage, url)


def _rebuild(storage: Storage, url: str | None) -> Rebuilt:
    home = storage.home.path
    is_new, moved = False, list[str]()
    if url is not None:
        refuse_in_use(url)
    else:
        with nobody_has_it_open(home):
            is_new = bool(faults(home))
            moved = set_aside(home) if is_new else []
    store, records = storage.adapters(), storage.records()
    # `digests` lacks one whose only copy has a tombstone. If the catalog wants it, a sweep keeps it.
    known = set(store.digests()) | {version.digest for version in records.read().versions if not version.parts}
    damaged = _damaged(store, known)
    whole = known - damaged.keys()
    engine = connect(home, url=url)
    try:
        catalog = Catalog(engine, records)
        if url is not None:
            is_new = not Catalog(engine, of=Viewpoint(sees_all=True)).list(limit=1)
        found = catalog.recover(whole.__contains__, Jobs(engine).is_known)
        store.doubt(digest for digest in whole if not catalog.in_use(digest))
    finally:
        engine.dispose()
    store.doubt({name.split("/")[1] for name in store.incomplete()})
    lost_jobs = {version.job_id for version in records.read().versions if version.job_id is not None}
    files = JobFiles(home, storage.bucket)
    lost_jobs |= {name for name in files.stored() if name.startswith("job-")}
    lost = sorted(lost_jobs) if is_new else []
    models = [files.model(job_id).relative_to(home).as_posix() for job_id in lost if files.model(job_id).is_dir()]
    return Rebuilt(is_new, tuple(moved), found, tuple(lost), tuple(models))


def _faults_at(home: Path, url: str) -> list[str]:
    """Return the faults of a PostgreSQL database's tables. It looks after its pages itself: see pg_amcheck."""
    engine = connect(home, url=url)
    try:
        return row_faults(engine, TABLES)
    finally:
        engine.dispose()


def _records(storage: Storage, url: str | None) -> Records | None:
    """Return the records. With PostgreSQL, only a bucket has records (`server.database.records_of`)."""
    return None if url is not None and storage.bucket is None else storage.records()


def _repaired(storage: Storage) -> str:
    return _REPAIRED if storage.bucket is None else f"to repair it, {_BY_REBUILD}"


def _removed(storage: Storage) -> str:
    return _REMOVED if storage.bucket is None else f"to remove it, {_BY_REBUILD}"


def _check_home(storage: Storage) -> None:
    home = storage.home.path
    if storage.bucket is not None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not storage.home.adapters.is_dir():
        raise StartupError(f"{home} isn't a server's home: it has no folder adapters; give --home or SMOLORA_HOME")


def _damaged(store: AdapterStore, digests: Iterable[str]) -> dict[str, str]:
    """Return a message for each of the adapters that is missing or damaged in the store, by digest."""
    found = {}
    for digest in digests:
        try:
            store.verify_stored(digest)
        except CorruptAdapter as error:
            found[digest] = str(error)
    return found


def _of_versions(versions: list[Version], damaged: dict[str, str]) -> Iterator[Finding]:
    listed = {(version.name, version.version): version for version in versions}
    for version in versions:
        name = f"{version.name}@{version.version}"
        for part in version.parts:
            if (of := listed.get((part.name, part.version))) is None or of.digest != part.digest:
                yield Finding(name, f"its part {part.name}@{part.version} is missing, or has other bytes")
        if not version.parts and version.digest in damaged:
            yield Finding(name, damaged[version.digest])


def _of_records(versions: list[Version], records: Records, remedy: str) -> Iterator[Finding]:
    """Yield the differences between the catalog's versions and the JSON files that record them.

    A version that is being published or deleted meanwhile may show up as a difference. `remedy` says what repairs
    one.
    """
    found = records.read()
    recorded = {(version.name, version.version): version for version in found.versions}
    listed = {(version.name, version.version): version for version in versions}
    for path in found.unreadable:
        yield Finding(f"adapters/{path}", f"this record is unreadable; {remedy}")
    for (name, number), version in listed.items():
        if recorded.get((name, number)) != version:
            yield Finding(f"{name}@{number}", f"its record is missing or differs; {remedy}")
    for name, number in sorted(recorded.keys() - listed.keys()):
        yield Finding(f"{name}@{number}", f"has a record, but isn't in the database; {remedy}")
