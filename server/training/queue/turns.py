"""Whose job a worker takes next: projects take turns, and within one the oldest comes first.

A turn is the claim of a job. A job that is put back, or whose worker died, gives its project the turn back, so
that what was begun goes on before another project's next job.

A clock may be set back: a lease that is longer than any is over then, and a turn that is to come doesn't count.
"""

import sqlalchemy as sa

from server.training.queue.tables import TRAIN, JobKind, Status, Time, jobs

LONGEST_LEASE = 300.0
"""Seconds: more than any lease, and than any job waits after a crash."""


def claimable(now: Time, kind: JobKind | None) -> "sa.Select[str, str, int, bool, int, str | None]":
    """The first job that waits, or whose lease ran out, of the project that had its last turn the longest ago."""
    is_open = jobs.c.status.in_([Status.QUEUED, Status.RUNNING])
    other = jobs.alias()
    was_lost = sa.and_(other.c.status == Status.RUNNING, is_over(other.c.lease_until, now))  # it is yet to be had
    had = (other.c.project == jobs.c.project, other.c.claimed_at <= now, sa.not_(was_lost))
    turns = sa.select(sa.func.max(other.c.claimed_at)).where(*had)
    columns = (jobs.c.id, jobs.c.status, jobs.c.token, jobs.c.wants_pause, jobs.c.stalled_attempts, jobs.c.crash)
    query = sa.select(*columns).where(is_open, is_over(jobs.c.lease_until, now))
    if kind is not None:
        query = query.where(sa.func.coalesce(jobs.c.spec["kind"].as_string(), TRAIN) == kind)
    return query.order_by(sa.func.coalesce(turns.scalar_subquery(), 0.0), jobs.c.number).limit(1)


def is_over(lease_until: "sa.ColumnElement[float]", now: Time) -> sa.ColumnElement[bool]:
    """Whether a lease that was given until then has run out."""
    return sa.or_(lease_until <= now, lease_until > now + LONGEST_LEASE)
