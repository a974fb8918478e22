"""Moves a HOME into a cluster that has nothing yet; HOME stays as it was.

Bytes go first, into a place that no server starts on meanwhile (`server.database.place`), and are compared; then
all rows in one transaction, with the place's name. Killed anywhere, it begins anew when it is run again: what it
had left in the object store goes first.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.store.shared import SharedAdapterStore
from adapters.store.store import AdapterStore
from server.backup.workspace import workspace
from server.database import connect, copy_alone, existing, faults, nobody_has_it_open, opened_copy, refuse_in_use
from server.database.place import MOVING, place_in, put_place, refuse_elsewhere
from server.database.rows import contents, copy_rows, refuse_rows
from server.errors import StartupError
from server.home import PLACES, Home, make, serving
from server.move.folders import jobs_of, uploads_of
from server.move.needs import TABLES, Moved, Needs, told
from server.storage import Storage
from server.training.queue.jobs import Jobs
from server.training.queue.moving import put_back

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket

WHY = "moved from a HOME, in which a worker had it"


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
                going_on = put_back(rows, WHY)
                cluster = connect(space / "cluster", url=url)
                try:
                    return _fill(Home(home), rows, cluster, target, going_on)
                finally:
                    cluster.dispose()


def _fill(home: Home, rows: sa.Engine, cluster: sa.Engine, target: Storage, going_on: list[str]) -> Moved:
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
