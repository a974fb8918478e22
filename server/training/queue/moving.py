"""Jobs that move with their HOME: what a copy of it must have for them, and how they go on in the copy."""

import sqlalchemy as sa

from server.database.clock import database_time
from server.training.queue import events as job_events
from server.training.queue.tables import Status, jobs, uses
from server.training.queue.turns import is_over

_ENDED = [status for status in Status if status.has_ended]


def used_by_unended(engine: sa.Engine) -> list[tuple[str, str]]:
    """Each job that hasn't ended with a digest of an adapter, or the id of a data set or file, that it needs."""
    query = sa.select(uses.c.job_id, uses.c.used).join(jobs, jobs.c.id == uses.c.job_id)
    with engine.connect() as connection:
        found = connection.execute(query.where(jobs.c.status.not_in(_ENDED)))
        return [(row.job_id, row.used) for row in found]


def with_folders(engine: sa.Engine) -> dict[str, Status]:
    """The jobs whose files weren't removed, and where each stands."""
    query = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.files_removed_at.is_(None))
    with engine.connect() as connection:
        return {row.id: Status(row.status) for row in connection.execute(query)}


def held(engine: sa.Engine) -> list[str]:
    """The jobs that a worker has just now: it may live, as far as its lease says."""
    is_kept = sa.not_(is_over(jobs.c.lease_until, database_time()))
    query = sa.select(jobs.c.id).where(jobs.c.status == Status.RUNNING, is_kept)
    with engine.connect() as connection:
        return list(connection.execute(query.order_by(jobs.c.number)).scalars())


def put_back(engine: sa.Engine, why: str) -> list[str]:
    """Let go of every job that a worker has, since that one has it elsewhere; their ids. `why` is told there.

    Each is claimable at once, whatever this machine's clock says of its lease, goes on from its newest checkpoint,
    and isn't charged for the time between. One that was to pause is paused.
    """
    with engine.begin() as connection:
        query = sa.select(jobs.c.id, jobs.c.wants_pause, jobs.c.stalled_attempts)
        running = connection.execute(query.where(jobs.c.status == Status.RUNNING).order_by(jobs.c.number)).all()
        for row in running:
            values = {
                "status": Status.PAUSED if row.wants_pause else Status.QUEUED,
                "wants_pause": False,
                "gives_way": False,
                "stalled_attempts": max(row.stalled_attempts - 1, 0),  # that attempt did nothing wrong
            }
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(values))
            job_events.append(connection, row.id, why)
        unended = jobs.c.status.not_in(_ENDED)
        connection.execute(sa.update(jobs).where(unended).values(lease_until=0.0, timed_at=None))
    return [row.id for row in running]
