"""The worker's side of the queue: claim a job, renew the lease by heartbeats, end the job or release it.

Every write names the claim's fencing token. If the claim is void, because the job was cancelled or claimed again,
the write changes nothing and raises LeaseLost. So a worker that was suspended for an hour can't publish or
overwrite anything, or do anything twice. The client's side of the queue is in `jobs.py`. Nothing here needs torch.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import cast

import sqlalchemy as sa

from adapters.catalog.catalog import NewVersion, Version, recording
from adapters.catalog.records import Records
from adapters.catalog.writes import publish_unattended_in
from adapters.names import key_of
from adapters.sql import reader_of, transact, transacted
from server.access.audit import record
from server.access.principal import ANONYMOUS
from server.access.projects import quotas_in
from server.database import without_writers_lock
from server.database.clock import database_now, database_time
from server.jobs import events as job_events
from server.jobs.events import Level, plain
from server.jobs.queries import STOP_STEP, version_limits
from server.jobs.tables import EVALUATE, Lane, Status, Time, charge, count_time, jobs
from server.jobs.turns import claimable, must_give_way, seconds_at_claim

LEASE_SECONDS = 10.0
"""At least three times as long as a transaction waits for PostgreSQL's locks: a busy lock loses no lease."""
METRICS_SECONDS = 1.0
"""The shortest time between two transactions that store metrics of a job's steps."""
MAX_STALLED_ATTEMPTS = 25
MAX_CRASH_DELAY = 5.0
BACK = "back in the queue"
GAVE_WAY = "gave way to another project's job after {}; goes on at its turn"
RULED_OUT = "full fine-tuning isn't allowed any more (the limit allow_full)"
Clock = Callable[[], Time]


class Directive(Enum):
    """An instruction of the queue to the worker that holds a claim."""

    GO_ON = auto()
    PAUSE = auto()  # checkpoint and release the job
    GIVE_WAY = (
        auto()
    )  # checkpoint after the current step, then release the job, so that another runs or it ends early
    ENDED = auto()  # this worker's own attempt has ended the job: clean up
    CANCEL = auto()  # the job was cancelled: drop everything
    LOST = auto()  # another worker has the job: drop everything


class LeaseLost(Exception):
    """The job has ended, or another worker has claimed it. Nothing was written; the holder must stop."""


@dataclass(frozen=True)
class Claim:
    """One attempt at a job. `token` counts the job's claims from 1."""

    job_id: str
    token: int
    owner: str


@dataclass
class _Measured:
    """A claim's metrics events, as messages and data, that aren't stored yet."""

    events: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    stored_at: float = float("-inf")  # by the monotonic clock; when metrics of the claim were stored last


class Leases:
    """The claims of all workers. Any number of processes may use the same tables.

    Thread-safe, except for `add_metrics` and what stores its metrics: only the process that runs a job calls it.

    Published versions are also written to `records`, from which a lost catalog is rebuilt. `now` reads the clock
    that all workers share. After `time_slice` seconds, a job gives way to another project's job; if this is 0, it
    never does.
    """

    def __init__(
        self,
        engine: sa.Engine,
        records: Records | None = None,
        now: Clock = database_time,
        time_slice: float = 0.0,
    ) -> None:
        self.time_slice = time_slice
        self._engine = engine
        self._records = records
        self._now = now
        self._reader = reader_of(engine)
        self._beside = without_writers_lock(engine)
        self._measured: dict[Claim, _Measured] = {}

    def claim(self, owner: str, lease_seconds: float = LEASE_SECONDS, lane: Lane | None = None) -> Claim | None:
        """Claim the job whose turn is next, among those that are waiting or whose lease has expired.

        Return None if there is no such job. If `lane` is None, jobs of every lane are considered. A job whose
        turn it is fails instead if too many attempts have stalled, or if its method is no longer allowed.
        """

        def work(connection: sa.Connection) -> Claim | None:
            query = claimable(self._now(), lane).with_for_update(of=jobs, skip_locked=True)
            while (row := connection.execute(query).first()) is not None:
                if row.wants_pause:
                    paused = {"status": Status.PAUSED, "wants_pause": False}
                    connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(paused))
                    job_events.append(connection, row.id, "paused")
                elif row.stalled_attempts >= MAX_STALLED_ATTEMPTS:
                    reason = f"{row.stalled_attempts} attempts in a row made no new checkpoint"
                    reason += f"; the last one: {row.crash}" if row.crash else ""
                    _end(connection, row.id, Status.FAILED, None, error=reason)
                    job_events.append(connection, row.id, reason, level="error")
                elif _is_ruled_out(connection, row.id):
                    _end(connection, row.id, Status.FAILED, None, error=RULED_OUT)
                    job_events.append(connection, row.id, RULED_OUT, level="error")
                else:
                    claim = Claim(row.id, row.token + 1, owner)
                    is_orphan = row.status == Status.RUNNING
                    used = seconds_at_claim(connection, claim.job_id, self.time_slice)
                    _start(connection, claim, self._now(), lease_seconds, used, is_orphan=is_orphan)
                    return claim
            return None

        with self._reader.connect() as connection:  # takes no lock, unlike the transaction
            if connection.execute(claimable(self._now(), lane)).first() is None:
                return None
        return transact(self._engine, work)

    def directive(self, claim: Claim) -> Directive:
        """Return the queue's instruction to the claim's holder. This takes one read and no lock."""
        with self._reader.connect() as connection:
            return _directive(connection, claim)

    def is_awaited(self, claim: Claim) -> bool:
        """Return whether the job should give way to another project's job. This takes one read and no lock."""
        with self._reader.connect() as connection:
            return bool(connection.execute(must_give_way(claim.job_id, self._now())).scalar_one_or_none())

    @transacted
    def give_way(self, connection: sa.Connection, claim: Claim) -> None:
        """Make the job give way if another project's job still waits for its worker.

        Raise LeaseLost if the claim is void.
        """
        _lock_claimed(connection, claim)
        if connection.execute(must_give_way(claim.job_id, self._now())).scalar_one_or_none():
            connection.execute(sa.update(jobs).where(jobs.c.id == claim.job_id).values(gives_way=True))

    def status(self, job_id: str) -> Status | None:
        """Return the job's status, or None if there is no such job."""
        with self._reader.connect() as connection:
            found = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == job_id)).scalar_one_or_none()
        return None if found is None else Status(found)

    def heartbeat(
        self,
        claim: Claim,
        lease_seconds: float = LEASE_SECONDS,
        progress: Mapping[str, object] | None = None,
        metrics: Mapping[str, object] | None = None,
    ) -> Directive:
        """Extend the lease to `lease_seconds` from now, store the job's progress, and return the directive.

        If the job has run for longer than its project or key allows (`max_job_seconds`), it fails instead. Like
        `flush`, the transaction locks the job's row alone, unless it ends the job.
        """
        values: dict[str, object] = {"lease_until": self._now() + lease_seconds, **count_time(self._now())}
        values |= {"progress": plain(progress)} if progress is not None else {}
        values |= {"metrics": plain(metrics)} if metrics is not None else {}

        def renew(connection: sa.Connection) -> Directive | None:
            connection.execute(sa.update(jobs).where(_is_claimed_by(claim)).values(values))
            return _directive(connection, claim) if _overtime(connection, claim) is None else None

        def renew_or_end(connection: sa.Connection) -> Directive:
            if (directive := renew(connection)) is not None:
                return directive
            error = _overtime(connection, claim)
            assert error is not None
            _end(connection, claim.job_id, Status.FAILED, self._now(), error=error)
            job_events.append(connection, claim.job_id, error, level="error")
            return Directive.CANCEL

        return transact(self._beside, renew) or transact(self._engine, renew_or_end)

    def add_event(
        self,
        claim: Claim,
        message: str,
        *,
        level: Level = "info",
        data: Mapping[str, object] | None = None,
    ) -> None:
        """Store an event. Raise LeaseLost if the claim is void."""

        def work(connection: sa.Connection) -> None:
            _lock_claimed(connection, claim)
            job_events.append(connection, claim.job_id, message, level=level, data=data)

        self.flush(claim)
        transact(self._engine, work)

    def add_metrics(self, claim: Claim, message: str, data: Mapping[str, object]) -> None:
        """Store the metrics of the step `data["step"]` as an event, at once or with those of the next steps.

        They are stored METRICS_SECONDS after the last ones at the earliest, by this method, by `flush_if_due`, or
        before any other event of the claim. The event is dropped if metrics of the same or a later step are stored
        already: an earlier attempt may have got further than its last checkpoint. Raise LeaseLost if the claim is
        void.
        """
        self._measured.setdefault(claim, _Measured()).events.append((message, plain(data)))
        self.flush_if_due(claim)

    def flush_if_due(self, claim: Claim) -> None:
        """Store the metrics that wait, unless some were stored in the last METRICS_SECONDS."""
        waiting = self._measured.get(claim)
        if waiting is not None and time.monotonic() - waiting.stored_at >= METRICS_SECONDS:
            self.flush(claim)

    def flush(self, claim: Claim) -> None:
        """Store the metrics that wait, in one transaction. Raise LeaseLost if the claim is void.

        The transaction doesn't take the writers' lock. It locks the job's row, which orders it with all other
        writes of the job, and waits for no other row.
        """
        if (waiting := self._measured.get(claim)) is None or not waiting.events:
            return

        def work(connection: sa.Connection) -> None:
            _lock_claimed(connection, claim)
            for message, data in waiting.events:
                step = cast("Mapping[str, int]", data)["step"]
                is_new = sa.and_(jobs.c.id == claim.job_id, jobs.c.metrics_step < step)
                if connection.execute(sa.update(jobs).where(is_new).values(metrics_step=step)).rowcount:
                    job_events.append(connection, claim.job_id, message, type="metrics", data=data)

        try:
            transact(self._beside, work)
        except LeaseLost:
            del self._measured[claim]
            raise
        waiting.events, waiting.stored_at = [], time.monotonic()

    def checkpointed(self, claim: Claim, step: int) -> None:
        """Record that the checkpoint of `step` is stored. Raise LeaseLost if the claim is void.

        If this is the job's newest checkpoint, reset the count of attempts that made no new checkpoint.
        """

        def work(connection: sa.Connection) -> None:
            _lock_claimed(connection, claim)
            is_new = sa.and_(jobs.c.id == claim.job_id, jobs.c.checkpoint_step < step)
            values = {"checkpoint_step": step, "stalled_attempts": 0}
            connection.execute(sa.update(jobs).where(is_new).values(values))

        self.flush(claim)  # steps before the checkpoint won't be computed again
        transact(self._engine, work)

    def succeed(
        self,
        claim: Claim,
        *,
        progress: Mapping[str, object],
        metrics: Mapping[str, object],
        report: Mapping[str, object],
        publish: NewVersion | None = None,
        alias: str | None = None,
        compared_with: int | None = None,
        worse: str | None = None,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
        data: Mapping[str, object] | None = None,
        num_bytes: int = 0,
    ) -> Version | None:
        """End the job with success and publish its adapter in one transaction.

        Raise LeaseLost if the claim is void, and LimitReached if the project has too many versions. The adapter's
        bytes must be in the store already. If `publish` is None, no version is published, and a training's report
        says why. `publish_unattended_in` explains `alias`, `compared_with`, `worse` and LatestMoved. If the new
        version doesn't become `latest`, the reason becomes an event. Each of the `notes`, which are sentences,
        becomes an event, too. If a version is published, so does each of the `warnings`, with words like "codes@1
        is" in front of it. The event that reports the success has `data`. `num_bytes` is the size of what the job
        leaves, apart from an adapter: a model, or findings.
        """

        def work(connection: sa.Connection) -> Version | None:
            _lock_claimed(connection, claim)
            documents = {"progress": progress, "metrics": metrics, "report": report}
            values: dict[str, object] = {key: plain(value) for key, value in documents.items()}
            values["bytes"] = num_bytes
            version = stays = None
            message = "succeeded"
            if publish is None and report.get("kind") != EVALUATE:
                message += "; no version was published"
            if publish is not None:
                mine = sa.select(jobs.c.project, jobs.c.key_id).where(jobs.c.id == claim.job_id)
                project, key_id = connection.execute(mine).one()
                of_project = {"name": key_of(project, publish.name), "job_id": claim.job_id, "key_id": key_id}
                new = dataclasses.replace(publish, **of_project)
                limits = version_limits(connection, project, key_id, without=claim.job_id)
                version, stays = publish_unattended_in(
                    connection, new, alias, records, compared_with, worse, limits
                )
                version = dataclasses.replace(version, name=publish.name)
                moves = {"moves_latest": stays is None}
                values["adapter"] = {key: getattr(version, key) for key in ("name", "version", "digest")} | moves
                values["report"] = plain({**report, **moves})
                detail = {"job": claim.job_id, "digest": version.digest, "alias": alias, **moves}
                target = f"{version.name}@{version.version}"
                record(connection, key_id or ANONYMOUS, "job.publish", project, target, detail)
                message = f"succeeded: {version.name}@{version.version}"
            _end(connection, claim.job_id, Status.SUCCEEDED, self._now(), **values)
            job_events.append(connection, claim.job_id, message, data=data)
            about = [f"{version.name}@{version.version} is {text}" for text in warnings] if version else []
            for text in (*notes, *about, *([] if stays is None else [stays])):
                job_events.append(connection, claim.job_id, text, level="warning")
            return version

        self.flush(claim)
        with recording(self._engine, None if publish is None else self._records) as records:
            return transact(self._engine, work)

    def fail(self, claim: Claim, error: str) -> None:
        """Mark the job as failed.

        `error` must be safe to show to clients. Raise LeaseLost if the claim is void.
        """

        def work(connection: sa.Connection) -> None:
            _lock_claimed(connection, claim)
            _end(connection, claim.job_id, Status.FAILED, self._now(), error=job_events.without_nul(error))
            job_events.append(connection, claim.job_id, error, level="error")

        self.flush(claim)
        transact(self._engine, work)

    @transacted
    def release(
        self,
        connection: sa.Connection,
        claim: Claim,
        reason: str = "",
        delay: float = 0.0,
        crash: str = "",
        gave_way_after: float | None = None,
    ) -> None:
        """Requeue the job at its old place after `delay` seconds, or pause it if a pause was requested.

        `reason` becomes an event. If the job gave way, an event says after how many seconds (`gave_way_after`).
        Only if `crash` is given, the attempt counts as one that made no new checkpoint. If there are too many of
        these in a row, the job fails, and its error quotes `crash`. Raise LeaseLost if the claim is void.
        """
        _lock_claimed(connection, claim)
        if reason:
            job_events.append(connection, claim.job_id, f"attempt {claim.token}: {reason}", level="warning")
        attempts = jobs.c.stalled_attempts
        uncounted = {"stalled_attempts": sa.case((attempts > 0, attempts - 1), else_=attempts)}
        data = connection.execute(sa.select(jobs.c.data).where(jobs.c.id == claim.job_id)).scalar_one()
        has_given_way = gave_way_after is not None and STOP_STEP not in data
        message = GAVE_WAY.format(in_words(gave_way_after or 0.0)) if has_given_way else BACK
        _requeue(connection, claim.job_id, self._now(), {"crash": crash} if crash else uncounted, delay, message)

    @transacted
    def crashed(
        self, connection: sa.Connection, claim: Claim, reason: str, max_delay: float = MAX_CRASH_DELAY
    ) -> None:
        """Requeue the job after a failed attempt, with a delay that doubles each time.

        Raise LeaseLost if the claim is void.
        """
        _lock_claimed(connection, claim)
        query = sa.select(jobs.c.stalled_attempts).where(jobs.c.id == claim.job_id)
        num_stalled = connection.execute(query).scalar_one()
        job_events.append(connection, claim.job_id, f"attempt {claim.token}: {reason}", level="warning")
        delay = min(0.1 * 2**num_stalled, max_delay)
        _requeue(connection, claim.job_id, self._now(), {"crash": job_events.without_nul(reason)}, delay)


def in_words(seconds: float) -> str:
    """Format a time for an event: "45 s" or "10 min"."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"


def _start(
    connection: sa.Connection, claim: Claim, now: Time, lease_seconds: float, used: float, is_orphan: bool
) -> None:
    """Store the claim in the job's row, with its lease.

    `used` is the time, in seconds, that the job's project is charged with. `is_orphan` says that the job's last
    worker stopped answering.
    """
    values = {
        "status": Status.RUNNING,
        "owner": claim.owner,
        "token": claim.token,
        "lease_until": now + lease_seconds,
        "project_seconds": used,
        "gives_way": False,
        "timed_at": now,
        "stalled_attempts": jobs.c.stalled_attempts + 1,
        "started_at": sa.func.coalesce(jobs.c.started_at, database_now()),
    }
    connection.execute(sa.update(jobs).where(jobs.c.id == claim.job_id).values(values))
    message = "started" if claim.token == 1 else f"started again (attempt {claim.token})"
    message = f"its worker stopped answering; {message}" if is_orphan else message
    job_events.append(connection, claim.job_id, message, level="warning" if is_orphan else "info")


def _lock_claimed(connection: sa.Connection, claim: Claim) -> None:
    """Lock the job's row until the end of the transaction. Raise LeaseLost if the claim is void."""
    locked = sa.update(jobs).where(_is_claimed_by(claim)).values(owner=claim.owner)
    if connection.execute(locked).rowcount == 0:
        raise LeaseLost(f"job {claim.job_id} is no longer this worker's")


def _requeue(
    connection: sa.Connection,
    job_id: str,
    now: Time,
    values: Mapping[str, object],
    delay: float = 0.0,
    message: str = BACK,
) -> None:
    """Requeue a claimed job with the event `message`. The job can be claimed again after `delay` seconds.

    If a pause was requested, pause the job instead.
    """
    until = now + delay
    mine = jobs.c.id == job_id
    pauses = connection.execute(sa.select(jobs.c.wants_pause).where(mine)).scalar_one()
    general: dict[str, object] = {
        "status": Status.PAUSED if pauses else Status.QUEUED,
        "wants_pause": False,
        "lease_until": until,
        "gives_way": False,
        **count_time(now),
    }
    connection.execute(sa.update(jobs).where(mine).values(general | dict(values)))
    job_events.append(connection, job_id, "paused" if pauses else message)


def _overtime(connection: sa.Connection, claim: Claim) -> str | None:
    """Return an error if the claimed job has run for longer than `max_job_seconds`, or None if it hasn't."""
    columns = (jobs.c.run_seconds, jobs.c.project, jobs.c.key_id)
    row = connection.execute(sa.select(*columns).where(_is_claimed_by(claim))).first()
    if row is None:
        return None
    limits = [quota.max_job_seconds for quota in quotas_in(connection, row.project, row.key_id)]
    most = min((limit for limit in limits if limit is not None), default=None)
    if most is None or row.run_seconds <= most:
        return None
    return f"it ran for longer than {most:,} s, the most that a job of its project or key may (max_job_seconds)"


def _is_ruled_out(connection: sa.Connection, job_id: str) -> bool:
    """Return whether the limits of the job's project and key don't allow its method, as they are now."""
    columns = (jobs.c.spec, jobs.c.project, jobs.c.key_id)
    row = connection.execute(sa.select(*columns).where(jobs.c.id == job_id)).one()
    limits = [quota.allow_full for quota in quotas_in(connection, row.project, row.key_id)]
    return row.spec.get("method") == "full" and False in limits


def _is_claimed_by(claim: Claim) -> sa.ColumnElement[bool]:
    return sa.and_(jobs.c.id == claim.job_id, jobs.c.token == claim.token, jobs.c.status == Status.RUNNING)


def _directive(connection: sa.Connection, claim: Claim) -> Directive:
    query = sa.select(jobs.c.status, jobs.c.token, jobs.c.wants_pause, jobs.c.gives_way).where(
        jobs.c.id == claim.job_id
    )
    row = connection.execute(query).first()
    if row is None or row.token != claim.token:
        return Directive.LOST
    if row.status == Status.RUNNING:
        if row.wants_pause:
            return Directive.PAUSE
        return Directive.GIVE_WAY if row.gives_way else Directive.GO_ON
    if row.status == Status.CANCELLED:
        return Directive.CANCEL
    return Directive.ENDED if Status(row.status).has_ended else Directive.LOST


def _end(connection: sa.Connection, job_id: str, status: Status, now: Time | None, **values: object) -> None:
    """End the job, and charge for its tokens and running time.

    If a worker ran the job until now, pass `now`, so that the running time includes the last seconds.
    """
    general: dict[str, object] = {
        "status": status,
        "wants_pause": False,
        "finished_at": database_now(),
        "bytes": 0,
    }
    general |= {} if now is None else count_time(now)
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(general | values))
    charge(connection, job_id)
