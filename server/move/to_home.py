"""Moves what a cluster has into an empty HOME, whole or not at all; the cluster stays as it was.

Rows come first, since they say what is needed; at the end they must still be the same.
"""

import os
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.durable import new_file, sync
from adapters.store.store import AdapterStore
from server.access.keys import Keys
from server.backup.filling import filled
from server.database import agree, connect, refuse_in_use
from server.database.rows import contents, copy_rows
from server.doctor import examine
from server.errors import StartupError
from server.home import Home
from server.move.folders import jobs_in, uploads_in
from server.move.needs import TABLES, Moved, Needs, told
from server.storage import Storage
from server.training.data.uploads import checked_uploads
from server.training.queue.jobs import Jobs
from server.training.queue.moving import held, put_back

WHY = "moved from a cluster, in which a worker had it"


def to_home(home: Path, url: str, source: Storage) -> Moved:
    """Fill `home`, which must be empty or not there, from the database at `url` and the bucket of `source`.

    Raises StartupError, and nothing stays then.
    """
    refuse_in_use(url)
    with told(), filled(home) as staging:
        cluster = connect(staging, url=url)
        try:
            return _fill(Home(staging), cluster, source)
        finally:
            cluster.dispose()


def _fill(home: Home, cluster: sa.Engine, source: Storage) -> Moved:
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
        going_on, needs = put_back(rows, WHY), Needs.of(rows)
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
