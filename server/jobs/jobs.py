"""Jobs, trainings and merges, as those see them who submit and steer them; workers have `leases.py`.

A project sees its own alone, and of another's it learns no more than of an id that nothing has.
Every write is one transaction, every read one statement. A job's rows, checkpoints and log are files under HOME,
which belong to others.

What a project has beside adapters: whoever deletes it asks here first.
"""

import builtins
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import cast

import sqlalchemy as sa

from adapters.catalog.tables import transact, transacted
from adapters.errors import Conflict
from adapters.names import Viewpoint
from server.database.clock import database_now, database_time
from server.errors import QueueFull
from server.jobs import events as job_events
from server.jobs.events import Event, plain
from server.jobs.merge_spec import Spec
from server.jobs.queries import (
    FINE_TUNING,
    Job,
    Standing,
    get_job,
    job_of,
    no_job,
    repeated,
    select_jobs,
)
from server.jobs.tables import Status, charge, count_time, jobs, uses
from server.jobs.turns import is_over
from server.storage.places import Storage
from server.system.messages import plural
from server.training.datasets import DatasetStore
from server.training.files import FileStore

__all__ = ["FINE_TUNING", "Event", "Job", "Jobs", "Standing", "Status", "no_job"]

MAX_UNFINISHED = 1000
_RETRY_SECONDS = 30.0

_Moves = Mapping[Status, tuple[Mapping[str, object], str] | None]
_ENDED = [status for status in Status if status.has_ended]


class Jobs:
    """All jobs, or a project's. Thread-safe; other processes may write the same tables."""

    def __init__(
        self,
        engine: sa.Engine,
        max_unfinished: int = MAX_UNFINISHED,
        of: Viewpoint | None = None,
        max_of_key: int | None = None,
    ) -> None:
        """`max_unfinished` jobs of a project may be unended at once, and `max_of_key` of the viewpoint's key."""
        self._engine = engine
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._max_unfinished = max_unfinished
        self._max_of_key = max_of_key
        self._of = of
        self._mine = sa.true() if of is None or of.sees_all else jobs.c.project == of.project

    def of(self, viewpoint: Viewpoint, max_of_project: int | None = None, max_of_key: int | None = None) -> "Jobs":
        """Those that a project sees; it may have so many at once that haven't ended, and so may its key."""
        most = self._max_unfinished if max_of_project is None else min(max_of_project, self._max_unfinished)
        return Jobs(self._engine, most, viewpoint, max_of_key)

    def submit(
        self,
        spec: Spec,
        *,
        job_id: str,
        data: Mapping[str, object],
        used: Iterable[str] = (),
        idempotency_key: str | None = None,
        body_digest: str = "",
        warnings: Iterable[str] = (),
    ) -> Job:
        """Queue a job whose files are in place; `used` are the ids and digests that must not be deleted meanwhile.

        `warnings` become its first events.

        A key that was used before returns its job (of another `id`: the new files are unwanted), and raises
        InvalidInput where the body was another one. Raises QueueFull where too many jobs haven't ended.
        """

        of = self._of or Viewpoint()
        stored_key = self._stored(idempotency_key)

        def work(connection: sa.Connection) -> Job:
            if (first := repeated(connection, stored_key, body_digest)) is not None:
                return first
            self._refuse_too_many(connection, of)
            row = {
                "id": job_id,
                "project": of.project,
                "key_id": of.key_id,
                "name": spec.name,
                "status": Status.QUEUED,
                "spec": job_events.storable(spec.to_document(), "spec"),
                "data": job_events.storable(plain(data), "data"),
                "progress": {},
                "metrics": {},
                "created_at": database_now(),
                "idempotency_key": stored_key,
                "body_digest": body_digest,
                "token": 0,
                "lease_until": 0.0,
                "wants_pause": False,
                "stalled_attempts": 0,
                "checkpoint_step": -1,
                "metrics_step": -1,
                "num_events": 0,
            }
            connection.execute(sa.insert(jobs).values(row))
            for name in sorted({*used, *spec.parents}):
                connection.execute(sa.insert(uses).values(job_id=job_id, used=name))
            job_events.append(connection, job_id, "queued")
            for text in warnings:
                job_events.append(connection, job_id, text, level="warning")
            return get_job(connection, job_id, sa.true())

        return transact(self._engine, work)

    def repeated(self, idempotency_key: str | None, body_digest: str) -> Job | None:
        """What `submit` would return for this key without a new job: to ask before work is put into one."""
        with self._reader.connect() as connection:
            return repeated(connection, self._stored(idempotency_key), body_digest)

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        with self._reader.connect() as connection:
            return get_job(connection, job_id, self._mine)

    def list(
        self, status: Status | None = None, limit: int = 100, before: str | None = None
    ) -> builtins.list[Job]:
        """The newest jobs first, at most `limit`: all or those of one status, older than `before`."""
        query = select_jobs().where(self._mine).order_by(jobs.c.number.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            other = jobs.alias()
            number = sa.select(other.c.number).where(other.c.id == before).scalar_subquery()
            query = query.where(jobs.c.number < number)
        with self._reader.connect() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """What happened to the job after the event numbered `after`, at most `limit` of it. Raises NotFound."""
        with self._reader.connect() as connection:
            if connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id, self._mine)).first() is None:
                raise no_job(job_id)
            return job_events.read(connection, job_id, after, limit)

    def standings(self, job_ids: Iterable[str]) -> dict[str, Standing]:
        """Of those of the jobs that there are."""
        query = sa.select(jobs.c.id, jobs.c.status, jobs.c.num_events)
        query = query.where(jobs.c.id.in_(list(job_ids)), self._mine)
        with self._reader.connect() as connection:
            rows = connection.execute(query).all()
        return {row.id: Standing(Status(row.status), row.num_events) for row in rows}

    def report(self, job_id: str) -> Mapping[str, object] | None:
        """The card of a job that succeeded; None before. Raises NotFound."""
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(jobs.c.report).where(jobs.c.id == job_id, self._mine)).first()
        if row is None:
            raise no_job(job_id)
        return cast("Mapping[str, object] | None", row.report)

    def cancel(self, job_id: str) -> Job:
        """End the job, from this moment; a worker that has it stops within a micro-step. NotFound, Conflict."""
        ended = {"status": Status.CANCELLED, "wants_pause": False, "finished_at": database_now()}
        of_running = {**ended, **count_time(database_time())}
        moves = {status: (ended, "cancelled") for status in Status if not status.has_ended}
        return self._steer(job_id, {**moves, Status.RUNNING: (of_running, "cancelled")})

    def pause(self, job_id: str) -> Job:
        """Have the job wait until it is resumed, one that runs after its micro-step. NotFound, Conflict."""
        return self._steer(
            job_id,
            {
                Status.QUEUED: ({"status": Status.PAUSED}, "paused"),
                Status.RUNNING: ({"wants_pause": True}, "pausing"),
                Status.PAUSED: None,
            },
        )

    def resume(self, job_id: str) -> Job:
        """Queue a paused job at its old place; nothing where it isn't paused. Raises NotFound, Conflict."""
        return self._steer(
            job_id,
            {
                Status.QUEUED: None,
                Status.RUNNING: ({"wants_pause": False}, "goes on"),
                Status.PAUSED: ({"status": Status.QUEUED, "lease_until": 0.0}, "resumed"),
            },
        )

    def in_use(self, used: str, project: str | None = None) -> bool:
        """Whether a job, of the project or of any, that hasn't ended needs the data set of that id, or the adapter
        of that digest.
        """
        query = sa.select(uses.c.job_id).join(jobs, jobs.c.id == uses.c.job_id)
        query = query.where(uses.c.used == used, jobs.c.status.not_in(_ENDED)).limit(1)
        if project is not None:
            query = query.where(jobs.c.project == project)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def num_unfinished(self) -> int:
        """How many haven't ended."""
        query = sa.select(sa.func.count()).select_from(jobs).where(self._mine, jobs.c.status.not_in(_ENDED))
        with self._reader.connect() as connection:
            return connection.execute(query).scalar_one()

    def counts(self) -> dict[Status, int]:
        """How many there are of each status that any has."""
        query = sa.select(jobs.c.status, sa.func.count()).where(self._mine).group_by(jobs.c.status)
        with self._reader.connect() as connection:
            return {Status(status): number for status, number in connection.execute(query)}

    def owners(self) -> set[str]:
        """The workers that keep a lease just now."""
        is_kept = sa.not_(is_over(jobs.c.lease_until, database_time()))
        query = sa.select(jobs.c.owner).where(jobs.c.status == Status.RUNNING, is_kept)
        with self._reader.connect() as connection:
            return set(filter(None, connection.execute(query).scalars()))

    def is_known(self, job_id: str) -> bool:
        """Whether there is such a job, ended or not."""
        query = sa.select(jobs.c.id).where(jobs.c.id == job_id)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    @transacted
    def remove_files(self, connection: sa.Connection, job_id: str) -> None:
        """Store that an ended job's files are no more, before they go; the first time counts.

        Raises NotFound, or Conflict where it hasn't ended.
        """
        mine = sa.and_(jobs.c.id == job_id, self._mine)
        status = connection.execute(sa.select(jobs.c.status).where(mine)).scalar_one_or_none()
        if status is None:
            raise no_job(job_id)
        if not Status(status).has_ended:
            raise Conflict(f"the job is {status}: cancel it first, or wait for its end")
        at = sa.func.coalesce(jobs.c.files_removed_at, database_now())
        connection.execute(sa.update(jobs).where(mine).values(files_removed_at=at))

    def with_files(self, before: datetime) -> builtins.list[str]:
        """The jobs that ended before then and still have their files, the oldest first."""
        query = sa.select(jobs.c.id).where(jobs.c.files_removed_at.is_(None), jobs.c.finished_at < before)
        with self._reader.connect() as connection:
            return list(connection.execute(query.order_by(jobs.c.finished_at)).scalars())

    def without_files(self, job_ids: Iterable[str]) -> builtins.list[str]:
        """Those whose files are no more."""
        query = sa.select(jobs.c.id).where(jobs.c.files_removed_at.is_not(None))
        with self._reader.connect() as connection:
            found = set(connection.execute(query).scalars())
        return [job_id for job_id in job_ids if job_id in found]

    @transacted
    def _steer(self, connection: sa.Connection, job_id: str, moves: _Moves) -> Job:
        """Change the job as `moves` says for its status, with that event; Conflict where it says nothing."""
        mine = sa.and_(jobs.c.id == job_id, self._mine)
        query = sa.select(jobs.c.status, jobs.c.wants_pause).where(mine).with_for_update()
        row = connection.execute(query).first()
        if row is None:
            raise no_job(job_id)
        if (status := Status(row.status)) not in moves:
            raise Conflict(f"the job has ended already: {status}")
        move = moves[status]
        if move is not None and move[0] != {"wants_pause": row.wants_pause}:  # not asked for already
            values, message = move
            connection.execute(sa.update(jobs).where(mine).values(dict(values)))
            job_events.append(connection, job_id, message)
            if values.get("status") == Status.CANCELLED:
                charge(connection, job_id)
        return get_job(connection, job_id, self._mine)

    def _stored(self, idempotency_key: str | None) -> str | None:
        """Each project has its own."""
        project = (self._of or Viewpoint()).project
        return None if idempotency_key is None else f"{project}/{idempotency_key}"

    def _refuse_too_many(self, connection: sa.Connection, of: Viewpoint) -> None:
        unfinished = sa.select(sa.func.count()).where(jobs.c.project == of.project, jobs.c.status.not_in(_ENDED))
        bounds = [(self._max_unfinished, "project", unfinished)]
        if self._max_of_key is not None:
            bounds.append((self._max_of_key, "key", unfinished.where(jobs.c.key_id == of.key_id)))
        for most, whose, query in bounds:
            if (number := connection.execute(query).scalar_one()) >= most:
                told = f"this {whose} has {plural(number, 'unfinished job')}, and may have {most:,} at once"
                raise QueueFull(told, _RETRY_SECONDS)


def refuse_with_uploads(storage: Storage, jobs: Jobs, project: str) -> None:
    """Raises Conflict where the project has data sets, files, or jobs that haven't ended. Blocks on disk."""
    datasets, files = storage.home.datasets(project), storage.home.files(project)
    has = {
        "data set": len(DatasetStore(datasets, bucket=storage.at(datasets)).ids()),
        "file": len(FileStore(files, bucket=storage.at(files)).ids()),
        "unfinished job": jobs.of(Viewpoint(project)).num_unfinished(),
    }
    if told := [plural(number, what) for what, number in has.items() if number]:
        raise Conflict(f"{project} has {', '.join(told)}: delete or cancel them first")
