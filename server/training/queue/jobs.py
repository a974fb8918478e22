"""Jobs, trainings and merges, as those see them who submit and steer them; workers have `leases.py`.

Every write is one transaction, every read one statement. A job's rows, checkpoints and log are files under HOME,
which belong to others.
"""

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, cast

import sqlalchemy as sa

from adapters.catalog.tables import UtcDateTime, transact
from adapters.errors import Conflict, InvalidInput, NotFound
from server.errors import QueueFull
from server.training.merge_spec import MergeSpec, Spec, read_spec
from server.training.queue import events as job_events
from server.training.queue.events import Event, plain
from server.training.queue.tables import JobKind, Status, jobs, uses

__all__ = ["Event", "Job", "Jobs", "Standing", "Status"]

NO_JOB = "there is no job {}: GET /train lists them"
MAX_UNFINISHED = 1000
FINE_TUNING = "fine_tuning"
"""The part of `Job.data` that jobs have which were made under /v1: what they have there and not under /train."""
_RETRY_SECONDS = 30.0

_ENDED = [status for status in Status if status.has_ended]


@dataclass(frozen=True)
class Job:
    """A job as it stands. `position` is its place among those that wait, from 1; None where it doesn't wait."""

    id: str
    name: str
    status: Status
    spec: Spec
    data: Mapping[str, object]
    progress: Mapping[str, object]
    metrics: Mapping[str, object]
    adapter: Mapping[str, object] | None  # name, version and digest of what it published
    error: str | None
    created_at: datetime  # in UTC, as the others
    started_at: datetime | None
    finished_at: datetime | None
    files_removed_at: datetime | None
    attempt: int
    position: int | None
    is_pausing: bool  # runs until its worker lets go

    @property
    def kind(self) -> JobKind:
        return "merge" if isinstance(self.spec, MergeSpec) else "train"


class Standing(NamedTuple):
    """What tells whether there is news of a job."""

    status: Status
    num_events: int  # the `seq` of the last one


class Jobs:
    """All jobs. Thread-safe; other processes may write the same tables."""

    def __init__(self, engine: sa.Engine, max_unfinished: int = MAX_UNFINISHED) -> None:
        self._engine = engine
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._max_unfinished = max_unfinished

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

        def work(connection: sa.Connection) -> Job:
            if (first := _repeated(connection, idempotency_key, body_digest)) is not None:
                return first
            unfinished = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status.not_in(_ENDED))
            if connection.execute(unfinished).scalar_one() >= self._max_unfinished:
                raise QueueFull(f"{self._max_unfinished} training jobs haven't ended", _RETRY_SECONDS)
            row = {
                "id": job_id,
                "name": spec.name,
                "status": Status.QUEUED,
                "spec": spec.to_document(),
                "data": plain(data),
                "progress": {},
                "metrics": {},
                "created_at": datetime.now(UTC),
                "idempotency_key": idempotency_key,
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
            return _get(connection, job_id)

        return transact(self._engine, work)

    def repeated(self, idempotency_key: str | None, body_digest: str) -> Job | None:
        """What `submit` would return for this key without a new job: to ask before work is put into one."""
        with self._reader.connect() as connection:
            return _repeated(connection, idempotency_key, body_digest)

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        with self._reader.connect() as connection:
            return _get(connection, job_id)

    def list(
        self, status: Status | None = None, limit: int = 100, before: str | None = None
    ) -> builtins.list[Job]:
        """The newest jobs first, at most `limit`: all or those of one status, older than `before`."""
        query = _select_jobs().order_by(jobs.c.number.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            other = jobs.alias()
            number = sa.select(other.c.number).where(other.c.id == before).scalar_subquery()
            query = query.where(jobs.c.number < number)
        with self._reader.connect() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """What happened to the job after the event numbered `after`, at most `limit` of it. Raises NotFound."""
        with self._reader.connect() as connection:
            found = job_events.read(connection, job_id, after, limit)
            if not found and connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id)).first() is None:
                raise NotFound(NO_JOB.format(job_id))
            return found

    def standings(self, job_ids: Iterable[str]) -> dict[str, Standing]:
        """Of those of the jobs that there are."""
        query = sa.select(jobs.c.id, jobs.c.status, jobs.c.num_events).where(jobs.c.id.in_(list(job_ids)))
        with self._reader.connect() as connection:
            rows = connection.execute(query).all()
        return {row.id: Standing(Status(row.status), row.num_events) for row in rows}

    def report(self, job_id: str) -> Mapping[str, object] | None:
        """The card of a job that succeeded; None before. Raises NotFound."""
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(jobs.c.report).where(jobs.c.id == job_id)).first()
        if row is None:
            raise NotFound(NO_JOB.format(job_id))
        return cast("Mapping[str, object] | None", row.report)

    def cancel(self, job_id: str) -> Job:
        """End the job, from this moment; a worker that has it stops within a micro-step. NotFound, Conflict."""
        ended = {"status": Status.CANCELLED, "wants_pause": False, "finished_at": datetime.now(UTC)}
        return self._steer(job_id, {status: (ended, "cancelled") for status in Status if not status.has_ended})

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

    def in_use(self, used: str) -> bool:
        """Whether a job that hasn't ended needs the data set of that id, or the adapter of that digest."""
        query = sa.select(uses.c.job_id).join(jobs, jobs.c.id == uses.c.job_id)
        query = query.where(uses.c.used == used, jobs.c.status.not_in(_ENDED)).limit(1)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def is_known(self, job_id: str) -> bool:
        """Whether there is such a job, ended or not."""
        query = sa.select(jobs.c.id).where(jobs.c.id == job_id)
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def remove_files(self, job_id: str) -> None:
        """Store that an ended job's files are no more, before they go; the first time counts.

        Raises NotFound, or Conflict where it hasn't ended.
        """
        with self._engine.begin() as connection:
            mine = jobs.c.id == job_id
            status = connection.execute(sa.select(jobs.c.status).where(mine)).scalar_one_or_none()
            if status is None:
                raise NotFound(NO_JOB.format(job_id))
            if not Status(status).has_ended:
                raise Conflict(f"the job is {status}: cancel it first, or wait for its end")
            at = sa.func.coalesce(jobs.c.files_removed_at, sa.literal(datetime.now(UTC), UtcDateTime()))
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

    def _steer(self, job_id: str, moves: Mapping[Status, tuple[Mapping[str, object], str] | None]) -> Job:
        """Change the job as `moves` says for its status, with that event; Conflict where it says nothing."""
        with self._engine.begin() as connection:
            mine = jobs.c.id == job_id
            query = sa.select(jobs.c.status, jobs.c.wants_pause).where(mine).with_for_update()
            row = connection.execute(query).first()
            if row is None:
                raise NotFound(NO_JOB.format(job_id))
            if (status := Status(row.status)) not in moves:
                raise Conflict(f"the job has ended already: {status}")
            move = moves[status]
            if move is not None and move[0] != {"wants_pause": row.wants_pause}:  # not asked for already
                values, message = move
                connection.execute(sa.update(jobs).where(mine).values(dict(values)))
                job_events.append(connection, job_id, message)
            return _get(connection, job_id)


def _select_jobs() -> "sa.Select[tuple[object, ...]]":
    ahead = jobs.alias()
    counted = sa.select(sa.func.count()).where(ahead.c.status == Status.QUEUED, ahead.c.number <= jobs.c.number)
    position = sa.case((jobs.c.status == Status.QUEUED, counted.scalar_subquery()), else_=None)
    columns = [column for column in jobs.columns if column is not jobs.c.report]
    return sa.select(*columns, position.label("position"))


def _get(connection: sa.Connection, job_id: str) -> Job:
    row = connection.execute(_select_jobs().where(jobs.c.id == job_id)).mappings().first()
    if row is None:
        raise NotFound(NO_JOB.format(job_id))
    return _job(row)


def _repeated(connection: sa.Connection, key: str | None, body_digest: str) -> Job | None:
    if key is None:
        return None
    row = connection.execute(_select_jobs().where(jobs.c.idempotency_key == key)).mappings().first()
    if row is None:
        return None
    if row["body_digest"] != body_digest:
        raise InvalidInput.of("Idempotency-Key", "this key was used with another body; take a new one")
    return _job(row)


def _job(row: sa.RowMapping) -> Job:
    same = ("id", "name", "data", "progress", "metrics", "adapter", "error", "position")
    times = ("created_at", "started_at", "finished_at", "files_removed_at")
    return Job(
        **{key: row[key] for key in same + times},
        status=Status(row["status"]),
        spec=read_spec(row["spec"]),
        attempt=row["token"],
        is_pausing=row["wants_pause"],
    )
