"""What moves: the tables, and the bytes that their rows name.

Folders of HOME, and the copies in a bucket that have the same files: uploads, and what jobs have.

Adapters are the stores' own (`adapters.store`). A job's log stays where it was written, as it does in a cluster.

Moves a HOME into a cluster that has nothing yet; HOME stays as it was.

Bytes go first, into a place that no server starts on meanwhile (`server.database.opening`), and are compared; then
all rows in one transaction, with the place's name. Killed anywhere, it begins anew when it is run again: what it
had left in the object store goes first.

Moves what a cluster has into an empty HOME, whole or not at all; the cluster stays as it was.

Rows come first, since they say what is needed; at the end they must still be the same.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import sqlalchemy as sa

from adapters.catalog import tables as catalog
from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.errors import CorruptAdapter, Unavailable
from adapters.names import DEFAULT_PROJECT, Viewpoint
from adapters.storage.bucket import Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import new_file, sync
from adapters.store.bucket_store import SharedAdapterStore
from adapters.store.store import AdapterStore
from server.access import tables as access
from server.access.keys import Keys
from server.database import (
    agree,
    connect,
    copy_alone,
    existing,
    faults,
    nobody_has_it_open,
    opened_copy,
    refuse_in_use,
)
from server.database.opening import MOVING, place_in, put_place, refuse_elsewhere
from server.database.rows import contents, copy_rows, refuse_rows
from server.errors import StartupError
from server.jobs import tables as queue
from server.jobs.files import (
    CHECKPOINT,
    CHECKPOINTS_NAME,
    LOG_NAME,
    MODEL,
    MODEL_MARK,
    MODEL_NAME,
    ROWS,
    JobFiles,
    held,
    put_back,
    used_by_unended,
    with_folders,
)
from server.jobs.jobs import Jobs
from server.jobs.tables import Status
from server.operations.backup import workspace
from server.operations.doctor import examine
from server.operations.restore import filled
from server.storage.home import DATA_NAME, PLACES, PROJECTS, Home, make, serving
from server.storage.places import Storage
from server.training.checkpoint import STATE_NAME, Checkpoints
from server.training.datasets import FACTS as DATASET_FACTS
from server.training.files import FACTS as FILE_FACTS
from server.training.files import checked_uploads

TABLES = [
    table
    for metadata in (catalog.metadata, access.metadata, queue.metadata)
    for table in metadata.sorted_tables
    if table is not access.changes  # of which every database has its own
]
"""In an order in which each may be filled."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Moved:
    """What was moved. `going_on` are the jobs that a worker had when it ended."""

    num_versions: int
    num_adapters: int
    num_jobs: int
    num_unended_jobs: int
    num_uploads: int  # data sets and files
    num_rows: int
    going_on: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # uploads that were so before, and are as they were


@dataclass(frozen=True)
class Needs:
    """What the rows name: adapters by digest, and the jobs that have files."""

    num_versions: int
    digests: tuple[str, ...]
    jobs: dict[str, Status]

    @classmethod
    def of(cls, engine: sa.Engine) -> "Needs":
        """Those of a database."""
        listed = Catalog(engine, of=Viewpoint(sees_all=True)).list()
        versions = [version for adapter in listed for version in adapter.versions]
        digests = {version.digest for version in versions if not version.parts}
        digests.update(used for _, used in used_by_unended(engine) if _DIGEST.fullmatch(used))
        return cls(len(versions), tuple(sorted(digests)), with_folders(engine))

    def moved(self, num_uploads: int, num_rows: int, going_on: list[str]) -> Moved:
        """All of it was."""
        return Moved(
            num_versions=self.num_versions,
            num_adapters=len(self.digests),
            num_jobs=len(self.jobs),
            num_unended_jobs=sum(not status.has_ended for status in self.jobs.values()),
            num_uploads=num_uploads,
            num_rows=num_rows,
            going_on=tuple(going_on),
        )


@contextmanager
def told() -> Iterator[None]:
    """A block whose faults are one line for the person at the terminal, as StartupError."""
    try:
        yield
    except CorruptAdapter as error:
        raise StartupError(f"{error}: smolora doctor says which versions that are; delete them first") from None
    except (Unavailable, Missing) as error:
        raise StartupError(f"{error}: run it again") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror or error}") from None


if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket


@dataclass(frozen=True)
class Folder:
    """One of HOME, at `path`, and as a copy of the folder `name` below a bucket's `prefix`; `mark` is last there.

    `copy` is the copy's id; None: any.
    """

    path: str
    prefix: str
    name: str
    mark: str
    copy: str | None = None

    def push(self, home: Path, bucket: "Bucket") -> None:
        """Upload it, and compare what is there then. Raises StartupError."""
        copies = Copies(bucket.under(self.prefix), self.mark)
        copy = copies.push(self.name, home / self.path, self.copy, without=(LOG_NAME,))
        self._compare(home, bucket, next(found for found in copies.whole(self.name) if found.id == copy))

    def fetch(self, home: Path, bucket: "Bucket") -> None:
        """Write it below `home`, and compare. Raises StartupError, Missing, OSError."""
        copies = Copies(bucket.under(self.prefix), self.mark)
        copy = next(found for found in copies.whole(self.name) if self.copy in (None, found.id))
        (home / self.path).mkdir(parents=True, exist_ok=True)
        copies.fetch(copy, home / self.path)
        self._compare(home, bucket, copy)

    def _compare(self, home: Path, bucket: "Bucket", copy: Copy) -> None:
        for name, stored in copy.files.items():
            there = _Digest()
            bucket.under(self.prefix).copy_to(stored, cast("BinaryIO", there))
            with open(home / self.path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != there.digest.digest():
                    raise StartupError(f"{self.path}/{name} isn't the same in the object store: run it again")


def uploads_of(home: Home) -> list[Folder]:
    """Data sets and files, of all projects."""
    found = []
    for project in home.projects():
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            prefix = root.relative_to(home.path).as_posix()
            names = sorted(path.parent.name for path in root.glob(f"*/{mark}") if path.parent.name[0] != ".")
            found += _uploads(prefix, names, mark)
    return found


def uploads_in(bucket: "Bucket") -> list[Folder]:
    """The same, of a bucket."""
    home, found = Home(Path()), []
    for project in [DEFAULT_PROJECT, *bucket.under(PROJECTS).folders()]:
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            copies = Copies(bucket.under(root.as_posix()), mark).all()
            found += _uploads(root.as_posix(), sorted({copy.folder for copy in copies if copy.is_whole}), mark)
    return found


def jobs_of(home: Home, needs: Needs) -> Iterator[Folder]:
    """Rows, models, and of those that haven't ended the checkpoints."""
    files = JobFiles(home.path)
    for job_id, status in needs.jobs.items():
        place = files.directory(job_id).relative_to(home.path).as_posix()
        if (files.directory(job_id) / DATA_NAME).exists():
            yield _rows(place, job_id)
        if (files.model(job_id) / MODEL_MARK).exists():
            yield _model(place, job_id, f"{MODEL}0")  # older than any that is made there
        if not status.has_ended:
            for token, step, _ in Checkpoints(files.checkpoints(job_id), 0).stored():
                yield _checkpoint(place, job_id, f"{token}-{step}")


def jobs_in(bucket: "Bucket", needs: Needs) -> Iterator[Folder]:
    """The same, of a bucket."""
    shared = bucket.under("jobs")
    for job_id, status in needs.jobs.items():
        place = f"jobs/{job_id}"
        if any(copy.id == ROWS for copy in Copies(shared, DATA_NAME).whole(job_id)):
            yield _rows(place, job_id)
        models = [copy.id for copy in Copies(shared, MODEL_MARK).whole(job_id) if copy.id.startswith(MODEL)]
        if models:
            yield _model(place, job_id, max(models, key=lambda name: int(name.removeprefix(MODEL))))
        if not status.has_ended:
            for copy in Copies(shared, STATE_NAME).whole(job_id):
                if copy.id.startswith(CHECKPOINT):
                    yield _checkpoint(place, job_id, copy.id.removeprefix(CHECKPOINT))


def _uploads(prefix: str, names: Sequence[str], mark: str) -> list[Folder]:
    return [Folder(f"{prefix}/{name}", prefix, name, mark) for name in names]


def _rows(place: str, job_id: str) -> Folder:
    return Folder(place, "jobs", job_id, DATA_NAME, ROWS)


def _model(place: str, job_id: str, copy: str) -> Folder:
    return Folder(f"{place}/{MODEL_NAME}", "jobs", job_id, MODEL_MARK, copy)


def _checkpoint(place: str, job_id: str, name: str) -> Folder:
    return Folder(f"{place}/{CHECKPOINTS_NAME}/{name}", "jobs", job_id, STATE_NAME, f"{CHECKPOINT}{name}")


class _Digest:
    """Hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        return len(piece)


if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

MOVED_TO_CLUSTER = "moved from a HOME, in which a worker had it"


def to_cluster(home: Path, url: str, target: Storage) -> Moved:
    """Fill the database at `url` and the target's bucket, both empty, from `home`. Raises StartupError."""
    existing(home)
    make(home)
    refuse_in_use(url)
    scratch = home / "tmp"
    with told(), serving(home), nobody_has_it_open(home):
        scratch.mkdir(exist_ok=True)
        with workspace(scratch / "move") as space:
            copy_alone(home, space / "database")
            with opened_copy(space / "database", space) as (rows, place):
                if found := faults(place):
                    raise StartupError(f"the database is damaged ({found[0]}): see smolora doctor")
                refuse_elsewhere(rows, "smolora move can't")
                going_on = put_back(rows, MOVED_TO_CLUSTER)
                cluster = connect(space / "cluster", url=url)
                try:
                    return _fill_cluster(Home(home), rows, cluster, target, going_on)
                finally:
                    cluster.dispose()


def _fill_cluster(home: Home, rows: sa.Engine, cluster: sa.Engine, target: Storage, going_on: list[str]) -> Moved:
    bucket, needs = _bucket(target), Needs.of(rows)
    own = _begin(cluster, target)
    local = AdapterStore(home.adapters)
    shared = SharedAdapterStore(home.adapters, bucket.under("adapters"))
    for digest in needs.digests:
        local.verify(digest)
        shared.share(digest)
        shared.verify_stored(digest)
    uploads = uploads_of(home)
    for folder in [*uploads, *jobs_of(home, needs)]:
        folder.push(home.path, bucket)
    with rows.connect() as source:
        expected = contents(source, TABLES)
        with cluster.begin() as connection:
            if place_in(connection) != own:
                raise StartupError("another smolora move has begun on this database: run one at a time")
            copy_rows(source, connection, TABLES)
            if contents(connection, TABLES) != expected:
                raise StartupError("the database's rows aren't the same there: run it again")
            put_place(connection, target.place)
    records = Catalog(cluster, target.records())
    records.recover(shared.is_whole, Jobs(cluster).is_known)
    bucket.delete([f"{PLACES}/{own}"])
    return needs.moved(len(uploads), sum(content.num_rows for content in expected.values()), going_on)


def _begin(cluster: sa.Engine, target: Storage) -> str:
    """See that there is nothing yet, but for what a move left that was cut off, and have no server start there.

    The id of the place meanwhile.
    """
    bucket = _bucket(target)
    with cluster.begin() as connection:
        refuse_rows(connection, TABLES, "SMOLORA_DATABASE_URL: the database")
        before = place_in(connection)
    keys = [stored.key for stored in bucket.listed()]
    others = [key for key in keys if not key.startswith((f"{PLACES}/", "clock/"))]
    if others and not (before is not None and before.startswith(MOVING) and target.place.has_mark(before)):
        raise StartupError(f"SMOLORA_BYTES_URL: {target.url} isn't empty, it has {others[0]}: give an empty place")
    with cluster.begin() as connection:
        own = put_place(connection, target.place, MOVING)
    bucket.delete(others)
    return own


def _bucket(storage: Storage) -> "Bucket":
    assert storage.bucket is not None
    return storage.bucket


MOVED_TO_HOME = "moved from a cluster, in which a worker had it"


def to_home(home: Path, url: str, source: Storage) -> Moved:
    """Fill `home`, which must be empty or not there, from the database at `url` and the bucket of `source`.

    Raises StartupError, and nothing stays then.
    """
    refuse_in_use(url)
    with told(), filled(home) as staging:
        cluster = connect(staging, url=url)
        try:
            return _fill_home(Home(staging), cluster, source)
        finally:
            cluster.dispose()


def _fill_home(home: Home, cluster: sa.Engine, source: Storage) -> Moved:
    bucket = source.bucket
    assert bucket is not None
    agree(cluster, source.place)
    if jobs := held(cluster):
        raise StartupError(
            f"a worker has {jobs[0]}: stop all workers; one that was killed has it for half a minute"
        )
    rows = connect(home.path)
    try:
        with cluster.begin() as connection, rows.begin() as target:
            copy_rows(connection, target, TABLES)
        with rows.connect() as copied:  # which takes a while: a transaction over there would have run out
            expected = contents(copied, TABLES)
        going_on, needs = put_back(rows, MOVED_TO_HOME), Needs.of(rows)
        store = replace(source, home=home, cache_bytes=None).adapters()  # its cache is as a HOME has them
        for digest in needs.digests:
            store.load(digest)
        uploads = uploads_in(bucket)
        for folder in [*uploads, *jobs_in(bucket, needs)]:
            folder.fetch(home.path, bucket)
        if Keys(rows, home.keyed).are_there() and not home.keyed.exists():
            with new_file(home.keyed):
                pass
        local = AdapterStore(home.adapters)
        Catalog(rows, Records(home.adapters)).recover(local.is_whole, Jobs(rows).is_known)
        with cluster.begin() as connection:
            if contents(connection, TABLES) != expected:
                raise StartupError(
                    "the cluster was used meanwhile: stop everything that uses it, and run it again"
                )
    finally:
        rows.dispose()
    if findings := examine(home.path, with_uploads=False).findings:
        raise StartupError(f"{findings[0].about}: {findings[0].message}")
    damaged = [f"{place}: {message}" for place, message in checked_uploads(Storage(home)) if message is not None]
    for place, _, _ in os.walk(home.path, topdown=False):
        sync(Path(place))
    num_rows = sum(content.num_rows for content in expected.values())
    return replace(needs.moved(len(uploads), num_rows, going_on), damaged=tuple(damaged))
