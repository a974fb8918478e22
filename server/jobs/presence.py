"""The workers of all machines that share a database server.

A thread of each worker renews the worker's row, without the writers' lock. A row that wasn't renewed for
KEEP_SECONDS doesn't count, and other workers delete it. With a database file there are no rows: its workers are on
one machine, where `server.jobs.supervisor.workers_of` lists them.
"""

import logging
import os
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from adapters.errors import Unavailable
from adapters.sql import PATIENCE, UtcDateTime, reader_of, transact
from server.database import is_file, without_writers_lock
from server.database.clock import database_time
from server.jobs.supervisor import own_name, started_at, workers_of
from server.jobs.tables import Status, jobs

BEAT_SECONDS = 5.0
"""Time between two renewals of a worker's row."""
KEEP_SECONDS = 20.0
_END_SECONDS = 5.0  # for the thread to delete the row, if the database answers slowly

metadata = sa.MetaData()

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),  # `own_name`, as in `jobs.owner`
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
    sa.Column("seen_at", sa.Float(53), nullable=False),  # by `database_time`
)

log = logging.getLogger("smolora.worker")


@dataclass(frozen=True)
class PresentWorker:
    """A worker that lives, and the ids of the jobs that it runs."""

    name: str
    host: str
    pid: int
    since: datetime
    job_ids: tuple[str, ...]

    def line(self) -> str:
        """Return a line for a person."""
        does = f"runs {', '.join(self.job_ids)}" if self.job_ids else "idle"
        since = self.since.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"worker on {self.host}, process {self.pid}, since {since}: {does}"


def present_workers(engine: sa.Engine, home: Path) -> list[PresentWorker]:
    """Return the workers of all machines, ordered by name. With a database file, return the workers of `home`."""
    running = sa.select(jobs.c.owner, jobs.c.id).where(
        jobs.c.status == Status.RUNNING, jobs.c.lease_until > database_time()
    )
    job_ids = defaultdict[str, list[str]](list)
    with reader_of(engine).connect() as connection:
        for owner, job_id in connection.execute(running.order_by(jobs.c.number)):
            job_ids[owner].append(job_id)
        rows = [] if is_file(engine) else connection.execute(_present()).all()
    if is_file(engine):
        started = {name: started_at(home, name) for name in workers_of(home)}
        parts = {name: name.split(":") for name in started}
        return [
            PresentWorker(name, parts[name][0], int(parts[name][1]), since, tuple(job_ids[name]))
            for name, since in started.items()
        ]
    return [PresentWorker(row.name, row.host, row.pid, row.since, tuple(job_ids[row.name])) for row in rows]


def _present() -> "sa.Select[tuple[object, ...]]":
    age = database_time() - workers.c.seen_at
    return sa.select(workers).where(age < KEEP_SECONDS).order_by(workers.c.name)


def present_names(engine: sa.Engine) -> set[str]:
    """Return the names of the workers that have a row."""
    with reader_of(engine).connect() as connection:
        return {row.name for row in connection.execute(_present())}


@contextmanager
def announced(engine: sa.Engine, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Keep a row for this worker while the block runs. With a database file, this is a no-op."""
    if is_file(engine):
        yield
        return
    beat = _Beat(engine, beat_seconds)
    beat.start()
    try:
        yield
    finally:
        beat.end()


class _Beat:
    """A thread that renews this worker's row. `end` alone waits for the database, for a few seconds at most."""

    def __init__(self, engine: sa.Engine, beat_seconds: float) -> None:
        self._engine = without_writers_lock(engine, is_losable=True).execution_options(**{PATIENCE: 0.0})
        self._beat_seconds = beat_seconds
        self._row = {
            "name": own_name(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC),
        }
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Delete the row, if the database answers within a moment."""
        self._has_ended.set()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        is_fine = True
        while not self._has_ended.is_set():
            try:
                transact(self._engine, self._renew)
                transact(self._engine, self._remove_expired)  # apart: workers that hold a row each would deadlock
                is_fine = True
            except (DBAPIError, Unavailable) as error:
                if is_fine:  # once for each outage
                    log.warning("this worker can't be listed now: %s", type(error).__name__)
                is_fine = False
            self._has_ended.wait(self._beat_seconds)
        with suppress(DBAPIError, Unavailable):  # the row expires
            transact(self._engine, self._delete)

    def _renew(self, connection: sa.Connection) -> None:
        now = {"seen_at": database_time()}
        mine = workers.c.name == self._row["name"]
        if not connection.execute(sa.update(workers).where(mine).values(self._row | now)).rowcount:
            connection.execute(sa.insert(workers).values(self._row | now))

    @staticmethod
    def _remove_expired(connection: sa.Connection) -> None:
        is_over = database_time() - workers.c.seen_at > KEEP_SECONDS
        connection.execute(sa.delete(workers).where(is_over))

    def _delete(self, connection: sa.Connection) -> None:
        connection.execute(sa.delete(workers).where(workers.c.name == self._row["name"]))
