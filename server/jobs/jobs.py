"""The client's side of the queue: submit, list, pause, resume and cancel jobs.

The worker's side is in `leases.py`. A project sees only its own jobs: another project's job seems not to exist.
Every write is one transaction, and every read one statement. `files.py` handles the jobs' files: rows,
checkpoints, models and logs.
"""

import builtins
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import cast

import sqlalchemy as sa

from adapters.catalog.writes import refuse_too_many
from adapters.errors import Conflict
from adapters.names import Viewpoint, key_of
from adapters.sql import reader_of, transact, transacted
from server.access.audit import record
from server.access.principal import ANONYMOUS
from server.access.projects import require_project
from server.database.clock import database_now, database_time
from server.errors import QueueFull
from server.jobs import events as job_events
from server.jobs.events import Event, plain
from server.jobs.queries import (
    FINE_TUNING,
    STOP_STEP,
    Job,
    Standing,
    get_job,
    job_of,
    no_job,
    repeated,
    select_jobs,
    version_limits,
)
from server.jobs.specs import Spec, may_publish
from server.jobs.tables import ENDED, EVALUATE, TRAIN, Status, charge, count_time, jobs, kind_of, uses
from server.jobs.turns import is_over
from server.storage.places import Storage
from server.system.messages import plural
from server.training.files import RowSources

__all__ = ["FINE_TUNING", "STOP_STEP", "Event", "Job", "Jobs", "Standing", "Status", "no_job"]

MAX_UNFINISHED = 1000
_RETRY_SECONDS = 30.0

_Moves = Mapping[Status, tuple[Mapping[str, object], str] | None]


class Jobs:
    """All jobs, or the jobs of one project. Thread-safe; other processes may write the same tables."""

    def __init__(
        self,
        engine: sa.Engine,
        max_unfinished: int = MAX_UNFINISHED,
        of: Viewpoint | None = None,
        max_of_key: int | None = None,
    ) -> None:
        """Show only jobs that the viewpoint `of` may see; if it is None, show all.

        A project may have at most `max_unfinished` unfinished jobs, and the viewpoint's API key at most
        `max_of_key` of these (None: any number).
        """
        self._engine = engine
        self._reader = reader_of(engine)
        self._max_unfinished = max_unfinished
        self._max_of_key = max_of_key
        self._of = of
        self._mine = sa.true() if of is None or of.sees_all else jobs.c.project == of.project

    def of(self, viewpoint: Viewpoint, max_of_project: int | None = None, max_of_key: int | None = None) -> "Jobs":
        """Return the jobs that the viewpoint may see, with limits on its project's and key's unfinished jobs."""
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
        num_bytes: int = 0,
    ) -> Job:
        """Queue a job whose files are already in its folder. `num_bytes` count as stored until the job ends.

        `used` are the ids of data sets and digests of adapters that must not be deleted before the job ends.
        `warnings` become events of the job. If the idempotency key was used before, return the job that was
        submitted then; the new files aren't needed. But if that request's body was different, raise InvalidInput.
        Raise QueueFull if there are too many unfinished jobs, LimitReached if there would be too many versions,
        and Conflict if the project was deleted.
        """

        of = self._of or Viewpoint()
        stored_key = self._stored(idempotency_key)

        def work(connection: sa.Connection) -> Job:
            if (first := repeated(connection, stored_key, body_digest)) is not None:
                return first
            require_project(connection, of.project)
            self._refuse_too_many(connection, of)
            if may_publish(spec):
                limits = version_limits(connection, of.project, of.key_id)
                refuse_too_many(connection, key_of(of.project, spec.name), of.key_id, limits)
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
                "bytes": num_bytes,
            }
            connection.execute(sa.insert(jobs).values(row))
            for name in sorted({*used, *spec.parents}):
                connection.execute(sa.insert(uses).values(job_id=job_id, used=name))
            job_events.append(connection, job_id, "queued")
            for text in warnings:
                job_events.append(connection, job_id, text, level="warning")
            job = get_job(connection, job_id, sa.true())
            record(connection, self._who, "job.submit", of.project, job_id, {"kind": job.kind, "name": job.name})
            return job

        return transact(self._engine, work)

    def repeated(self, idempotency_key: str | None, body_digest: str) -> Job | None:
        """Return the job that was submitted with this idempotency key, or None if there is none.

        Call this before preparing a job's files. Raise InvalidInput if that job's request body was different.
        """
        with self._reader.connect() as connection:
            return repeated(connection, self._stored(idempotency_key), body_digest)

    def get(self, job_id: str) -> Job:
        """Return the job. Raise NotFound if there is no such job."""
        with self._reader.connect() as connection:
            return get_job(connection, job_id, self._mine)

    def list(
        self,
        status: Status | None = None,
        limit: int = 100,
        before: str | None = None,
        *,
        evaluations: bool = False,
    ) -> builtins.list[Job]:
        """List at most `limit` trainings and merges, or `evaluations` instead, the newest first.

        If given, `status` and `before` restrict the list. `before` is a job's id: only older jobs are listed.
        """
        is_evaluation = kind_of(jobs) == EVALUATE
        query = select_jobs().where(self._mine, is_evaluation if evaluations else sa.not_(is_evaluation))
        query = query.order_by(jobs.c.number.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            other = jobs.alias()
            number = sa.select(other.c.number).where(other.c.id == before).scalar_subquery()
            query = query.where(jobs.c.number < number)
        with self._reader.connect() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """Return at most `limit` of the job's events whose numbers are above `after`, in order.

        Raise NotFound if there is no such job.
        """
        with self._reader.connect() as connection:
            if connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id, self._mine)).first() is None:
                raise no_job(job_id)
            return job_events.read(connection, job_id, after, limit)

    def standings(self, job_ids: Iterable[str]) -> dict[str, Standing]:
        """Return each job's status and number of events. Jobs that don't exist are left out."""
        query = sa.select(jobs.c.id, jobs.c.status, jobs.c.num_events)
        query = query.where(jobs.c.id.in_(list(job_ids)), self._mine)
        with self._reader.connect() as connection:
            rows = connection.execute(query).all()
        return {row.id: Standing(Status(row.status), row.num_events) for row in rows}

    def report(self, job_id: str) -> Mapping[str, object] | None:
        """Return the report of a job, or None if it hasn't succeeded. Raise NotFound if there is no such job."""
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(jobs.c.report).where(jobs.c.id == job_id, self._mine)).first()
        if row is None:
            raise no_job(job_id)
        return cast("Mapping[str, object] | None", row.report)

    def cancel(self, job_id: str) -> Job:
        """Cancel the job now. If a worker runs the job, it soon kills the job's process.

        Raise NotFound if there is no such job, and Conflict if it has ended.
        """
        ended = {"status": Status.CANCELLED, "wants_pause": False, "finished_at": database_now(), "bytes": 0}
        of_running = {**ended, **count_time(database_time())}
        moves = {status: (ended, "cancelled") for status in Status if not status.has_ended}
        return self._steer(job_id, "job.cancel", {**moves, Status.RUNNING: (of_running, "cancelled")})

    def pause(self, job_id: str) -> Job:
        """Pause the job until it is resumed. A running job first finishes its current micro-batch.

        Raise NotFound if there is no such job, and Conflict if it has ended.
        """
        return self._steer(
            job_id,
            "job.pause",
            {
                Status.QUEUED: ({"status": Status.PAUSED}, "paused"),
                Status.RUNNING: ({"wants_pause": True}, "pausing"),
                Status.PAUSED: None,
            },
        )

    def resume(self, job_id: str) -> Job:
        """Requeue a paused job at its old place in the queue. If a running job was asked to pause, let it run on.

        Raise NotFound if there is no such job, and Conflict if it has ended.
        """
        return self._steer(
            job_id,
            "job.resume",
            {
                Status.QUEUED: None,
                Status.RUNNING: ({"wants_pause": False}, "goes on"),
                # `lease_until` may hold the delay after a crash (`Leases.crashed`), which a resumed job skips.
                Status.PAUSED: ({"status": Status.QUEUED, "lease_until": 0.0}, "resumed"),
            },
        )

    @transacted
    def stop(self, connection: sa.Connection, job_id: str) -> Job:
        """End a training early: its best weights so far are measured, and published if its gate allows that.

        A running job's process exits after its current step. The job's next attempt, which keeps the job's place
        in the queue, trains no further. A second call changes nothing. Raise NotFound if there is no such job, and
        Conflict if it has ended, isn't a training, or hasn't completed a step.
        """
        mine = sa.and_(jobs.c.id == job_id, self._mine)
        columns = (jobs.c.status, jobs.c.project, jobs.c.data, jobs.c.progress, kind_of(jobs).label("kind"))
        row = connection.execute(sa.select(*columns).where(mine).with_for_update()).first()
        if row is None:
            raise no_job(job_id)
        if (status := Status(row.status)).has_ended:
            raise Conflict(f"the job has ended already: {status}")
        if row.kind != TRAIN:
            raise Conflict("only a training has weights to keep before its end: cancel this job instead")
        if not (step := row.progress.get("step")):
            raise Conflict("the job hasn't completed a step, so it has no weights to keep: cancel it instead")
        if STOP_STEP not in row.data:
            values = {"data": {**row.data, STOP_STEP: step}, "wants_pause": False}
            values |= {"gives_way": True} if status is Status.RUNNING else {"status": Status.QUEUED}
            values |= {"lease_until": 0.0} if status is Status.PAUSED else {}
            connection.execute(sa.update(jobs).where(mine).values(values))
            job_events.append(connection, job_id, f"ending early, after step {step}")
            record(connection, self._who, "job.stop", row.project, job_id)
        return get_job(connection, job_id, self._mine)

    def in_use(self, used: str, project: str | None = None) -> bool:
        """Return whether an unfinished job needs `used`: a data set's id or an adapter's digest.

        If `project` is given, only that project's jobs are considered.
        """
        query = sa.select(uses.c.job_id).join(jobs, jobs.c.id == uses.c.job_id)
        query = query.where(uses.c.used == used, jobs.c.status.not_in(ENDED)).limit(1)
        if project is not None:
            query = query.where(jobs.c.project == project)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def num_unfinished(self) -> int:
        """Count the jobs that haven't ended."""
        query = sa.select(sa.func.count()).select_from(jobs).where(self._mine, jobs.c.status.not_in(ENDED))
        with self._reader.connect() as connection:
            return connection.execute(query).scalar_one()

    def num_bytes(self, key_id: str | None = None, without: str | None = None) -> int:
        """Return the bytes that the project's jobs count with, except the job `without`. See `server.jobs.room`.

        If `key_id` is given, only jobs that this API key submitted count.
        """
        total = sa.select(sa.func.coalesce(sa.func.sum(jobs.c.bytes), 0))
        total = total.where(jobs.c.project == (self._of or Viewpoint()).project)
        if key_id is not None:
            total = total.where(jobs.c.key_id == key_id)
        if without is not None:
            total = total.where(jobs.c.id != without)
        with self._reader.connect() as connection:
            return int(connection.execute(total).scalar_one())

    def uncounted(self) -> builtins.list[str]:
        """Return the ids of jobs of an older release that still have files, whose size isn't known yet."""
        query = sa.select(jobs.c.id).where(jobs.c.bytes.is_(None), jobs.c.files_removed_at.is_(None))
        with self._reader.connect() as connection:
            return list(connection.execute(query).scalars())

    @transacted
    def count_bytes(self, connection: sa.Connection, job_id: str, num_bytes: int) -> None:
        """Store the size of the files of a job of an older release, unless it is known already."""
        mine = (jobs.c.id == job_id, jobs.c.bytes.is_(None))
        connection.execute(sa.update(jobs).where(*mine).values(bytes=num_bytes))

    def counts(self) -> dict[Status, int]:
        """Count the jobs of each status; statuses without jobs are left out."""
        query = sa.select(jobs.c.status, sa.func.count()).where(self._mine).group_by(jobs.c.status)
        with self._reader.connect() as connection:
            return {Status(status): number for status, number in connection.execute(query)}

    def oldest_queued(self) -> datetime | None:
        """Return when the oldest job was queued that waits for its first start, or None if no job does."""
        waits = sa.and_(jobs.c.status == Status.QUEUED, jobs.c.started_at.is_(None))
        with self._reader.connect() as connection:
            return connection.execute(sa.select(sa.func.min(jobs.c.created_at)).where(self._mine, waits)).scalar()

    def owners(self) -> set[str]:
        """Return the names of the workers that hold a lease."""
        is_kept = sa.not_(is_over(jobs.c.lease_until, database_time()))
        query = sa.select(jobs.c.owner).where(jobs.c.status == Status.RUNNING, is_kept)
        with self._reader.connect() as connection:
            return set(filter(None, connection.execute(query).scalars()))

    def is_known(self, job_id: str) -> bool:
        """Return whether the job exists, ended or not."""
        query = sa.select(jobs.c.id).where(jobs.c.id == job_id)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    @transacted
    def remove_files(self, connection: sa.Connection, job_id: str) -> None:
        """Record that an ended job's files are removed. Call this before removing the files.

        An evaluation's list of flips is removed with them, and so are the samples in a training's events, since
        they quote rows. A second call keeps the recorded time of the first.
        Raise NotFound if there is no such job, and Conflict if it hasn't ended.
        """
        mine = sa.and_(jobs.c.id == job_id, self._mine)
        row = connection.execute(sa.select(jobs.c.status, jobs.c.report).where(mine)).first()
        if row is None:
            raise no_job(job_id)
        if not Status(row.status).has_ended:
            raise Conflict(f"the job is {row.status}: cancel it first, or wait for its end")
        values: dict[str, object] = {"bytes": 0}
        values["files_removed_at"] = sa.func.coalesce(jobs.c.files_removed_at, database_now())
        if (row.report or {}).get("kind") == EVALUATE:
            values["report"] = {**row.report, "flips": []}
        connection.execute(sa.update(jobs).where(mine).values(values))
        job_events.remove_samples(connection, job_id)

    def with_files(self, before: datetime) -> builtins.list[str]:
        """Return the ids of jobs that ended before `before` and still have their files, the oldest first."""
        query = sa.select(jobs.c.id).where(jobs.c.files_removed_at.is_(None), jobs.c.finished_at < before)
        with self._reader.connect() as connection:
            return list(connection.execute(query.order_by(jobs.c.finished_at)).scalars())

    def without_files(self, job_ids: Iterable[str]) -> builtins.list[str]:
        """Return the ids, among `job_ids`, of jobs whose files are recorded as removed."""
        query = sa.select(jobs.c.id).where(jobs.c.files_removed_at.is_not(None))
        with self._reader.connect() as connection:
            found = set(connection.execute(query).scalars())
        return [job_id for job_id in job_ids if job_id in found]

    @transacted
    def _steer(self, connection: sa.Connection, job_id: str, action: str, moves: _Moves) -> Job:
        """Change the job's row and add an event, as the entry of `moves` for the job's status says.

        `action` is for the audit log. If that entry is None, change nothing. Raise NotFound if there is no such
        job, and Conflict if `moves` has no entry for the job's status.
        """
        mine = sa.and_(jobs.c.id == job_id, self._mine)
        query = sa.select(jobs.c.status, jobs.c.wants_pause, jobs.c.project).where(mine).with_for_update()
        row = connection.execute(query).first()
        if row is None:
            raise no_job(job_id)
        if (status := Status(row.status)) not in moves:
            raise Conflict(f"the job has ended already: {status}")
        move = moves[status]
        if move is not None and move[0] != {"wants_pause": row.wants_pause}:  # the move isn't done already
            values, message = move
            connection.execute(sa.update(jobs).where(mine).values(dict(values)))
            job_events.append(connection, job_id, message)
            record(connection, self._who, action, row.project, job_id)
            if values.get("status") == Status.CANCELLED:
                charge(connection, job_id)
        return get_job(connection, job_id, self._mine)

    @property
    def _who(self) -> str:
        return (self._of or Viewpoint()).key_id or ANONYMOUS

    def _stored(self, idempotency_key: str | None) -> str | None:
        """Return the idempotency key with the project's name in front, since each project has its own keys."""
        project = (self._of or Viewpoint()).project
        return None if idempotency_key is None else f"{project}/{idempotency_key}"

    def _refuse_too_many(self, connection: sa.Connection, of: Viewpoint) -> None:
        unfinished = sa.select(sa.func.count()).where(jobs.c.project == of.project, jobs.c.status.not_in(ENDED))
        bounds = [(self._max_unfinished, "project", unfinished)]
        if self._max_of_key is not None:
            bounds.append((self._max_of_key, "key", unfinished.where(jobs.c.key_id == of.key_id)))
        for most, whose, query in bounds:
            if (number := connection.execute(query).scalar_one()) >= most:
                message = f"this {whose} has {plural(number, 'unfinished job')}, and may have {most:,} at once"
                raise QueueFull(message, _RETRY_SECONDS, reason="max_jobs")


def retire_jobs(connection: sa.Connection, project: str, retired: str) -> None:
    """Rename the project of a deleted project's jobs, within a transaction. Drop their idempotency keys.

    Raise Conflict if one of them hasn't ended.
    """
    unfinished = sa.select(jobs.c.id).where(jobs.c.project == project, jobs.c.status.not_in(ENDED))
    if connection.execute(unfinished.limit(1)).first() is not None:
        raise Conflict(f"{project} has unfinished jobs: cancel them first")
    values = {"project": retired, "idempotency_key": None}
    connection.execute(sa.update(jobs).where(jobs.c.project == project).values(values))


def refuse_with_uploads(storage: Storage, jobs: Jobs, project: str) -> None:
    """Raise Conflict if the project has data sets, files, or unfinished jobs. This does I/O, so it may block."""
    sources = RowSources.of(storage, project)
    has = {
        "data set": len(sources.datasets.ids()),
        "file": len(sources.files.ids()),
        "unfinished job": jobs.of(Viewpoint(project)).num_unfinished(),
    }
    if found := [plural(number, what) for what, number in has.items() if number]:
        raise Conflict(f"{project} has {', '.join(found)}: delete or cancel them first")
