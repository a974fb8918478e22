"""Whose job a worker takes next: projects take turns, and within one the oldest comes first.

A turn is the claim of a job. A job that is put back, or whose worker died, gives its project the turn back, so
that what was begun goes on before another project's next job.
"""

import sqlalchemy as sa

from server.training.queue.tables import TRAIN, JobKind, Status, Time, jobs


def claimable(now: Time, kind: JobKind | None) -> "sa.Select[str, str, int, bool, int, str | None]":
    """The first job that waits, or whose lease ran out, of the project that had its last turn the longest ago."""
    is_open = jobs.c.status.in_([Status.QUEUED, Status.RUNNING])
    other = jobs.alias()
    was_lost = sa.and_(other.c.status == Status.RUNNING, other.c.lease_until <= now)  # its turn is yet to be had
    turns = sa.select(sa.func.max(other.c.claimed_at)).where(other.c.project == jobs.c.project, sa.not_(was_lost))
    columns = (jobs.c.id, jobs.c.status, jobs.c.token, jobs.c.wants_pause, jobs.c.stalled_attempts, jobs.c.crash)
    query = sa.select(*columns).where(is_open, jobs.c.lease_until <= now)
    if kind is not None:
        query = query.where(sa.func.coalesce(jobs.c.spec["kind"].as_string(), TRAIN) == kind)
    return query.order_by(sa.func.coalesce(turns.scalar_subquery(), 0.0), jobs.c.number).limit(1)
