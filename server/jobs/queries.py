"""Jobs as values, and the SQL statements that read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import NamedTuple

import sqlalchemy as sa

from adapters.catalog.versions import VersionLimits
from adapters.errors import Hint, InvalidInput, NotFound
from server.access.projects import quotas_in
from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.merge_spec import MergeSpec
from server.jobs.specs import Spec, read_spec
from server.jobs.tables import ENDED, EVALUATE, MERGE, TRAIN, JobKind, Status, jobs, kind_of
from server.jobs.turns import position

FINE_TUNING = "fine_tuning"
"""The key in `Job.data` for what is stored only with jobs that were created under /v1."""
STOP_STEP = "stop_step"
"""The key in `Job.data` for the step after which a training was asked to end, if it was."""


@dataclass(frozen=True)
class Job:
    """A job as stored. `position` is a queued job's place in the queue, from 1; None for other jobs."""

    id: str
    project: str
    key_id: str | None  # of the API key that submitted it
    name: str
    status: Status
    spec: Spec
    data: Mapping[str, object]
    progress: Mapping[str, object]
    metrics: Mapping[str, object]
    adapter: Mapping[str, object] | None  # name, version and digest of the published adapter
    error: str | None
    created_at: datetime  # all times are in UTC
    started_at: datetime | None
    finished_at: datetime | None
    files_removed_at: datetime | None
    attempt: int
    position: int | None
    is_pausing: bool  # a pause was requested, but the job still runs

    @property
    def kind(self) -> JobKind:
        if isinstance(self.spec, EvaluateSpec):
            return EVALUATE
        return MERGE if isinstance(self.spec, MergeSpec) else TRAIN


class Standing(NamedTuple):
    """A job's status and number of events. Compare two to see whether the job has a new status or event."""

    status: Status
    num_events: int  # the last event's `seq`


def select_jobs() -> "sa.Select[tuple[object, ...]]":
    """Return a query for all jobs. `job_of` converts its rows."""
    columns = [column for column in jobs.columns if column is not jobs.c.report]
    return sa.select(*columns, position().label("position"))


def no_job(job_id: str) -> NotFound:
    """Return the error to raise if the project has no job with this id."""
    hint = Hint("list_jobs", "GET /train lists them")
    return NotFound(f"there is no job {job_id}: {hint}", hint=hint)


def get_job(connection: sa.Connection, job_id: str, mine: sa.ColumnElement[bool]) -> Job:
    """Return the job. Raise NotFound if it doesn't exist or if the condition `mine` doesn't hold for it."""
    row = connection.execute(select_jobs().where(jobs.c.id == job_id, mine)).mappings().first()
    if row is None:
        raise no_job(job_id)
    return job_of(row)


def repeated(connection: sa.Connection, key: str | None, body_digest: str) -> Job | None:
    """Return the job that was submitted with this idempotency key, or None if there is none.

    `key` is in its stored form, which starts with the project's name. Raise InvalidInput if that job's
    request body was different.
    """
    if key is None:
        return None
    row = connection.execute(select_jobs().where(jobs.c.idempotency_key == key)).mappings().first()
    if row is None:
        return None
    if row["body_digest"] != body_digest:
        raise InvalidInput.of("Idempotency-Key", "this key was used with another body; take a new one")
    return job_of(row)


def num_publishing(
    connection: sa.Connection, project: str, key_id: str | None = None, without: str | None = None
) -> int:
    """Count a project's unfinished jobs that may publish a version, except the job `without`.

    If `key_id` is given, only jobs that this API key submitted count.
    """
    may_publish = (kind_of(jobs) != EVALUATE, sa.func.coalesce(jobs.c.spec["method"].as_string(), "") != "full")
    query = sa.select(sa.func.count()).select_from(jobs)
    query = query.where(jobs.c.project == project, jobs.c.status.not_in(ENDED), *may_publish)
    if key_id is not None:
        query = query.where(jobs.c.key_id == key_id)
    if without is not None:
        query = query.where(jobs.c.id != without)
    return connection.execute(query).scalar_one()


def version_limits(
    connection: sa.Connection, project: str, key_id: str | None, without: str | None = None
) -> VersionLimits:
    """Return the limits on a project's and a key's versions. `num_publishing` counts the reserved ones."""
    of_project, of_key = quotas_in(connection, project, key_id)
    return VersionLimits(of_project.max_versions, of_key.max_versions, partial(num_publishing, without=without))


def job_of(row: sa.RowMapping) -> Job:
    """Convert a row of `select_jobs` to a job."""
    same = ("id", "project", "key_id", "name", "data", "progress", "metrics", "adapter", "error", "position")
    times = ("created_at", "started_at", "finished_at", "files_removed_at")
    return Job(
        **{key: row[key] for key in same + times},
        status=Status(row["status"]),
        spec=read_spec(row["spec"]),
        attempt=row["token"],
        is_pausing=row["wants_pause"],
    )
