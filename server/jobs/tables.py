"""The tables of jobs, and how a job's time is counted and charged.

`number` orders the queue. A job that is requeued keeps its number, and so its old place. Leases are timed by the
database's clock. A job's usage is charged once, in the transaction that ends the job.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

import sqlalchemy as sa

from adapters.names import DEFAULT_PROJECT, MAX_NAME, key_of
from adapters.sql import UtcDateTime
from server.access.principal import ANONYMOUS
from server.access.usage import Account, Usage, add_in

JobKind = Literal["train", "merge", "evaluate"]
"""The value of `spec["kind"]`, except that a training job's spec has no "kind"."""
Lane = Literal["train", "merge"]
"""A worker runs one job of each lane at a time. Evaluations are in the lane of trainings, since both load the
base's weights.
"""
TRAIN: Literal["train"] = "train"
MERGE: Literal["merge"] = "merge"
EVALUATE: Literal["evaluate"] = "evaluate"


Time = sa.ColumnElement[float]
"""Seconds since 1970 by the clock that all workers share."""


class Status(StrEnum):
    """A job's status. The last three are final."""

    QUEUED = "queued"  # waits for a worker, for the first time or again
    RUNNING = "running"  # a worker runs it, or did when it died
    PAUSED = "paused"  # waits until it is resumed
    SUCCEEDED = "succeeded"  # and published, if it is a training whose gate allowed that, or a merge
    FAILED = "failed"  # for good; `error` says why
    CANCELLED = "cancelled"  # by a client

    @property
    def has_ended(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


ENDED = [status for status in Status if status.has_ended]

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("project", sa.String(MAX_NAME), nullable=False, server_default=DEFAULT_PROJECT),
    sa.Column("key_id", sa.String(64)),  # of the API key that submitted it
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("progress", sa.JSON, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("adapter", sa.JSON(none_as_null=True)),
    sa.Column("report", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.Text),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    sa.Column(
        "idempotency_key", sa.String(320), unique=True
    ),  # "project/key", since each project has its own keys
    sa.Column("body_digest", sa.String(64)),
    sa.Column("owner", sa.String(255)),  # the worker that claimed it last
    sa.Column("token", sa.Integer, nullable=False),  # fencing token: how often the job was claimed
    sa.Column("lease_until", sa.Float(53), nullable=False),  # by `database_time`; the job can't be claimed before
    sa.Column("timed_at", sa.Float(53)),  # the time until which `run_seconds` is counted
    sa.Column(
        "run_seconds", sa.Float(53), nullable=False, server_default="0"
    ),  # the time of all its attempts together
    sa.Column("project_seconds", sa.Float(53)),  # the time its project has used, according to this row
    sa.Column("wants_pause", sa.Boolean, nullable=False),  # a running job's worker should release it
    sa.Column(
        "gives_way", sa.Boolean, nullable=False, server_default=sa.false()
    ),  # a running job's worker should release it after the current step
    sa.Column("stalled_attempts", sa.Integer, nullable=False),  # claims since the last new checkpoint
    sa.Column("crash", sa.Text),  # why the last failed attempt ended
    sa.Column("checkpoint_step", sa.Integer, nullable=False),  # the newest checkpoint's; -1: none
    sa.Column("metrics_step", sa.Integer, nullable=False),  # the newest metrics event's; -1: none
    sa.Column("num_events", sa.Integer, nullable=False),
    sa.Column("files_removed_at", UtcDateTime),  # null while its model and log exist
    sa.Column("bytes", sa.BigInteger),  # as `room` counts them; null: not yet, since an older release made the job
    sa.Index("ix_jobs_status_number", "status", "number"),
    sa.Index("ix_jobs_project_number", "project", "number"),
    sa.Index("ix_jobs_project_seconds", "project", "project_seconds"),
    sa.Index("ix_jobs_seconds", "project_seconds"),
)

uses = sa.Table(
    "job_uses",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("used", sa.String(255), primary_key=True, index=True),  # a data set's id, or an adapter's digest
)

events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),  # 1, 2, … within its job
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("level", sa.String(16), nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)


def kind_of(table: sa.FromClause) -> sa.ColumnElement[str]:
    """Return the SQL expression for a job's kind. `table` is `jobs` or an alias of it."""
    return sa.func.coalesce(table.c.spec["kind"].as_string(), TRAIN)


def lane_of(table: sa.FromClause) -> sa.ColumnElement[str]:
    """Return the SQL expression for a job's lane. `table` is `jobs` or an alias of it."""
    return sa.case((kind_of(table) == MERGE, MERGE), else_=TRAIN)


def count_time(now: Time) -> dict[str, object]:
    """Return the values to write to a running job's row so that its time is counted up to `now`.

    Time counts up to the lease's end at most, since after that no worker is known to run the job. For each lane,
    the seconds that a project has used are the largest `project_seconds` of its jobs. So that value also grows by
    the time of the project's other running jobs in the lane.
    """
    since, lease_until = sa.func.coalesce(jobs.c.timed_at, now), jobs.c.lease_until
    until = sa.case((now < lease_until, now), else_=lease_until)
    seconds = sa.case((until > since, until - since), else_=0.0)
    other = jobs.alias()
    same = (other.c.status == Status.RUNNING, other.c.project == jobs.c.project, lane_of(other) == lane_of(jobs))
    num_running = sa.select(sa.func.count()).where(*same).correlate(jobs).scalar_subquery()
    used = sa.func.coalesce(jobs.c.project_seconds, 0.0) + seconds * num_running
    return {"run_seconds": jobs.c.run_seconds + seconds, "project_seconds": used, "timed_at": now}


def charge(connection: sa.Connection, job_id: str) -> None:
    """Charge the job's tokens and running time to the account of the API key that submitted the job."""
    columns = (jobs.c.project, jobs.c.key_id, jobs.c.name, jobs.c.progress, jobs.c.run_seconds)
    row = connection.execute(sa.select(*columns).where(jobs.c.id == job_id)).one()
    adapter = key_of(row.project, row.name)
    tokens = row.progress.get("tokens", 0)
    if not tokens and not row.run_seconds:  # it never ran
        return
    account = Account(datetime.now(UTC).date(), row.project, row.key_id or ANONYMOUS, adapter)
    add_in(connection, account, Usage(trained_tokens=int(tokens), job_seconds=row.run_seconds))
