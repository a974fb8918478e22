"""Moves everything that is stored, between a HOME and a cluster: the tables, and the bytes that their rows name.

A move to a cluster, which must be empty, copies the bytes first, and compares them. Meanwhile no server starts on
the cluster's database (`server.database.opening`). Then one transaction writes all rows, and records where the
bytes are. If the move is killed, the next run removes what is in the object store and begins again. HOME stays as
it was.

A move to an empty HOME copies the rows first, since they say which bytes are needed. At the end the cluster's rows
must still be the same. HOME is filled whole or not at all, and the cluster stays as it was.

Jobs' logs aren't moved.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.errors import CorruptAdapter, Unavailable
from adapters.names import DEFAULT_PROJECT, Viewpoint
from adapters.storage.blobs import Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import new_file, sync
from adapters.store.bucket_store import BucketAdapterStore
from adapters.store.store import AdapterStore
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
from server.database.migrating import refuse_newer
from server.database.opening import MOVING, place_in, put_place, refuse_elsewhere
from server.database.rows import contents, copy_rows, refuse_rows
from server.errors import StartupError
from server.jobs.files import (
    CHECKPOINTS_NAME,
    LOG_NAME,
    MODEL_MARK,
    MODEL_NAME,
    JobFiles,
    leased,
    requeue_running,
    used_by_unended,
    with_folders,
)
from server.jobs.jobs import Jobs
from server.jobs.tables import Status
from server.operations.backup import workspace
from server.operations.doctor import TABLES, examine
from server.operations.restore import filled, recover_jobs_and_records
from server.storage.home import CHECKPOINT_COPY, MODEL_COPY, PLACES, PROJECTS, ROWS_COPY, Home, make, serving
from server.storage.places import Storage
from server.training.checkpoint import STATE_NAME, Checkpoints
from server.training.datasets import FACTS as DATASET_FACTS
from server.training.files import FACTS as FILE_FACTS
from server.training.files import checked_uploads
from server.training.job_data import DATA_NAME

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

MOVED_TO_CLUSTER = "moved from a HOME, in which a worker had it"
MOVED_TO_HOME = "moved from a cluster, in which a worker had it"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Moved:
    """A report of what was moved. `going_on` are the jobs that were running at the source."""

    num_versions: int
    num_adapters: int
    num_jobs: int
    num_unended_jobs: int
    num_uploads: int  # data sets and files
    num_rows: int
    going_on: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # uploads that were already damaged, and were moved unchanged


def to_cluster(home: Path, url: str, target: Storage) -> Moved:
    """Fill the database at `url` and the target's bucket, which must be empty, from `home`.

    Raise StartupError if that fails.
    """
    existing(home)
    make(home)
    refuse_in_use(url)
    scratch = home / "tmp"
    with _startup_errors(), serving(home), nobody_has_it_open(home):
        scratch.mkdir(exist_ok=True)
        with workspace(scratch / "move") as space:
            copy_alone(home, space / "database")
            with opened_copy(space / "database", space) as (rows, place):
                if found := faults(place):
                    raise StartupError(f"the database is damaged ({found[0]}): see smolora doctor")
                refuse_elsewhere(rows, "smolora move can't")
                going_on = requeue_running(rows, MOVED_TO_CLUSTER)
                cluster = connect(space / "cluster", url=url)
                try:
                    for engine in (rows, cluster):
                        refuse_newer(engine)
                    return _fill_cluster(Home(home), rows, cluster, target, going_on)
                finally:
                    cluster.dispose()


def to_home(home: Path, url: str, source: Storage) -> Moved:
    """Fill `home`, which must be empty or absent, from the database at `url` and the source's bucket.

    Raise StartupError if that fails, and leave nothing in `home`.
    """
    refuse_in_use(url)
    with _startup_errors(), filled(home) as staging:
        cluster = connect(staging, url=url)
        try:
            refuse_newer(cluster)
            return _fill_home(Home(staging), cluster, source)
        finally:
            cluster.dispose()


def _fill_cluster(home: Home, rows: sa.Engine, cluster: sa.Engine, target: Storage, going_on: list[str]) -> Moved:
    bucket, needs = _bucket(target), _Needs.of(rows)
    own = _begin(cluster, target)
    local = AdapterStore(home.adapters)
    store = BucketAdapterStore(home.adapters, bucket.under("adapters"))
    for digest in needs.digests:
        local.verify(digest)
        store.upload(digest)
        store.verify_stored(digest)
    uploads = _uploads_of(home)
    for folder in [*uploads, *_jobs_of(home, needs)]:
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
    Catalog(cluster, target.records()).recover(store.is_whole, Jobs(cluster).is_known)
    bucket.delete([f"{PLACES}/{own}"])
    return needs.moved(len(uploads), sum(content.num_rows for content in expected.values()), going_on)


def _begin(cluster: sa.Engine, target: Storage) -> str:
    """Check that the target is empty, except for what a killed move left there, which is removed.

    Until the move is complete, no server can start with the target's database. Return the id that this database
    records for the bucket during the move.
    """
    bucket = _bucket(target)
    with cluster.begin() as connection:
        refuse_rows(connection, TABLES, "SMOLORA_DATABASE_URL: the database")
        before = place_in(connection)
    others = [key for key in bucket.keys("") if not key.startswith((f"{PLACES}/", "clock/"))]
    if others and not (before is not None and before.startswith(MOVING) and target.place.has_mark(before)):
        raise StartupError(f"SMOLORA_BYTES_URL: {target.url} isn't empty, it has {others[0]}: give an empty place")
    with cluster.begin() as connection:
        own = put_place(connection, target.place, MOVING)
    bucket.delete(others)
    return own


def _fill_home(home: Home, cluster: sa.Engine, source: Storage) -> Moved:
    bucket = _bucket(source)
    agree(cluster, source.place)
    if jobs := leased(cluster):
        raise StartupError(
            f"a worker has {jobs[0]}: stop all workers; the lease of a killed worker expires after half a minute"
        )
    rows = connect(home.path)
    try:
        with cluster.begin() as connection, rows.begin() as target:
            copy_rows(connection, target, TABLES)
        with rows.connect() as copied:  # this takes so long that a transaction of the cluster would time out
            expected = contents(copied, TABLES)
        needs = _Needs.of(rows)
        store = replace(source, home=home, cache_bytes=None).adapters()  # its cache has the layout of a HOME
        for digest in needs.digests:
            store.load(digest)
        uploads = _uploads_in(bucket)
        for folder in [*uploads, *_jobs_in(bucket, needs)]:
            folder.fetch(home.path, bucket)
        if Keys(rows, home.keyed).are_there() and not home.keyed.exists():
            with new_file(home.keyed):
                pass
        going_on = recover_jobs_and_records(home, rows, MOVED_TO_HOME)
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


@dataclass(frozen=True)
class _Needs:
    """What a database's rows refer to: adapters, by digest, and jobs that have files."""

    num_versions: int
    digests: tuple[str, ...]
    jobs: dict[str, Status]

    @classmethod
    def of(cls, engine: sa.Engine) -> "_Needs":
        """Return what the database's rows refer to."""
        listed = Catalog(engine, of=Viewpoint(sees_all=True)).list()
        versions = [version for adapter in listed for version in adapter.versions]
        digests = {version.digest for version in versions if not version.parts}
        digests.update(used for _, used in used_by_unended(engine) if _DIGEST.fullmatch(used))
        return cls(len(versions), tuple(sorted(digests)), with_folders(engine))

    def moved(self, num_uploads: int, num_rows: int, going_on: list[str]) -> Moved:
        """Return the report of a move of everything that the rows refer to."""
        return Moved(
            num_versions=self.num_versions,
            num_adapters=len(self.digests),
            num_jobs=len(self.jobs),
            num_unended_jobs=sum(not status.has_ended for status in self.jobs.values()),
            num_uploads=num_uploads,
            num_rows=num_rows,
            going_on=tuple(going_on),
        )


@dataclass(frozen=True)
class _Folder:
    """An upload's or a job's folder to move. In HOME its path is `path`.

    In a bucket, each copy of the folder is below `<prefix>/<name>`, and has an id. The file `mark` is uploaded
    last, so a copy that has this file is complete. `copy` is the id of the copy to move, or None for any complete
    copy.
    """

    path: str
    prefix: str
    name: str
    mark: str
    copy: str | None = None

    def push(self, home: Path, bucket: "Bucket") -> None:
        """Upload the folder, and compare the copy with it. Raise StartupError if they differ."""
        self._copies(bucket).push(self.name, home / self.path, self.copy, without=(LOG_NAME,))
        self._compare(home, bucket, self._copy(bucket))

    def fetch(self, home: Path, bucket: "Bucket") -> None:
        """Download the folder, and compare it with the bucket's copy. Raise StartupError if they differ.

        Raise Missing if an object was deleted meanwhile, and OSError if the disk fails.
        """
        copy = self._copy(bucket)
        (home / self.path).mkdir(parents=True, exist_ok=True)
        self._copies(bucket).fetch(copy, home / self.path)
        self._compare(home, bucket, copy)

    def _copies(self, bucket: "Bucket") -> Copies:
        return Copies(bucket.under(self.prefix), self.mark)

    def _copy(self, bucket: "Bucket") -> Copy:
        return next(copy for copy in self._copies(bucket).whole(self.name) if self.copy in (None, copy.id))

    def _compare(self, home: Path, bucket: "Bucket", copy: Copy) -> None:
        for name, stored in copy.files.items():
            with open(home / self.path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if bucket.under(self.prefix).digest(stored) != digest:
                raise StartupError(f"{self.path}/{name} isn't the same in the object store: run it again")


def _uploads_of(home: Home) -> list[_Folder]:
    """Return the folders of all projects' data sets and files in HOME."""
    found = []
    for project in home.projects():
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            names = sorted(path.parent.name for path in root.glob(f"*/{mark}") if path.parent.name[0] != ".")
            found += _uploads(root.relative_to(home.path), names, mark)
    return found


def _uploads_in(bucket: "Bucket") -> list[_Folder]:
    """Return the folders of all projects' data sets and files in the bucket."""
    home, found = Home(Path()), []
    for project in [DEFAULT_PROJECT, *bucket.under(PROJECTS).folders()]:
        for root, mark in ((home.datasets(project), DATASET_FACTS), (home.files(project), FILE_FACTS)):
            copies = Copies(bucket.under(root.as_posix()), mark).all()
            found += _uploads(root, sorted({copy.folder for copy in copies if copy.is_whole}), mark)
    return found


def _uploads(root: Path, names: list[str], mark: str) -> list[_Folder]:
    prefix = root.as_posix()
    return [_Folder(f"{prefix}/{name}", prefix, name, mark) for name in names]


def _jobs_of(home: Home, needs: _Needs) -> Iterator[_Folder]:
    """Yield the folders of jobs in HOME: training rows, models, and unfinished jobs' checkpoints."""
    files = JobFiles(home.path)
    for job_id, status in needs.jobs.items():
        if (files.directory(job_id) / DATA_NAME).exists():
            yield _job_folder(job_id, ROWS_COPY)
        if (files.model(job_id) / MODEL_MARK).exists():
            yield _job_folder(job_id, f"{MODEL_COPY}0")  # older than any model that is made there
        if not status.has_ended:
            for token, step, _ in Checkpoints(files.checkpoints(job_id), 0).stored():
                yield _job_folder(job_id, f"{CHECKPOINT_COPY}{token}-{step}")


def _jobs_in(bucket: "Bucket", needs: _Needs) -> Iterator[_Folder]:
    """Yield the folders of jobs in the bucket: training rows, models, and unfinished jobs' checkpoints."""
    copies = Copies(bucket.under("jobs"), DATA_NAME)
    for job_id, status in needs.jobs.items():
        folders = [(_job_folder(job_id, copy.id), copy) for copy in copies.of(job_id)]
        whole = [folder for folder, copy in folders if folder.mark in copy.files]
        models = [folder for folder in whole if folder.mark == MODEL_MARK]
        if models:  # only the last attempt's
            yield max(models, key=lambda folder: int(str(folder.copy).removeprefix(MODEL_COPY)))
        wanted = (DATA_NAME,) if status.has_ended else (DATA_NAME, STATE_NAME)
        yield from (folder for folder in whole if folder.mark in wanted)


def _job_folder(job_id: str, copy: str) -> _Folder:
    place = f"jobs/{job_id}"
    if copy == ROWS_COPY:
        return _Folder(place, "jobs", job_id, DATA_NAME, copy)
    if copy.startswith(MODEL_COPY):
        return _Folder(f"{place}/{MODEL_NAME}", "jobs", job_id, MODEL_MARK, copy)
    name = copy.removeprefix(CHECKPOINT_COPY)
    return _Folder(f"{place}/{CHECKPOINTS_NAME}/{name}", "jobs", job_id, STATE_NAME, copy)


def _bucket(storage: Storage) -> "Bucket":
    assert storage.bucket is not None
    return storage.bucket


@contextmanager
def _startup_errors() -> Iterator[None]:
    """Turn errors in the block into a StartupError with a message of one line."""
    try:
        yield
    except CorruptAdapter as error:
        raise StartupError(f"{error}: smolora doctor names its versions; delete them first") from None
    except (Unavailable, Missing) as error:
        raise StartupError(f"{error}: run it again") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartupError(f"{where}{error.strerror or error}") from None
