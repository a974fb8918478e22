"""The order of turns: which job a worker claims next, which running job gives way, and where a waiting job stands.

Projects share the workers by time. The next turn is that of the project with the fewest running jobs. Among
projects with equally few, it is that of the project that has used the fewest seconds. Within a project the oldest
job comes first. A project is charged for all attempts, however they end. It can't save up time while it has no
jobs: if it is more than one time slice behind the project that has used the most seconds, a claim raises its
seconds until it is one time slice behind. So a project that uses less than its share waits for one running slice
at most, and a project that trained alone for days doesn't pay for that later.

Each lane is scheduled separately: merges in one, trainings and evaluations in the other. A lease that is longer
than any real one counts as expired, since a clock must have been set back.
"""

import sqlalchemy as sa

from server.jobs.tables import TRAIN, Lane, Status, Time, jobs, lane_of

LONGEST_LEASE = 300.0
"""Seconds: longer than any lease, and than any delay after a crash."""
LEAST_SECONDS = 1.0
"""The least that a project is charged for a claim, so that projects alternate even if their jobs take no time."""


def claimable(now: Time, lane: Lane | None) -> "sa.Select[str, str, int, bool, int, str | None]":
    """Return a query for the job to claim next. If `lane` is None, jobs of every lane are considered.

    A queued job can be claimed once its delay is over, and a running job once its lease has expired.
    """
    mine = _shares(now)
    columns = (jobs.c.id, jobs.c.status, jobs.c.token, jobs.c.wants_pause, jobs.c.stalled_attempts, jobs.c.crash)
    query = sa.select(*columns).join(mine, _is_share_of(mine, jobs))
    query = query.where(_is_open(jobs), is_over(jobs.c.lease_until, now))
    if lane is not None:
        query = query.where(mine.c.lane == lane)
    return query.order_by(mine.c.running, mine.c.seconds, jobs.c.number).limit(1)


def seconds_at_claim(connection: sa.Connection, job_id: str, time_slice: float) -> float:
    """Return the seconds that count as used by the job's project once the job is claimed.

    The result is at most `time_slice` seconds less than the most that any project has used.
    """
    mine, other = jobs.alias(), jobs.alias()
    same = (other.c.project == mine.c.project, lane_of(other) == lane_of(mine))
    own = sa.select(sa.func.max(other.c.project_seconds)).where(*same).scalar_subquery()
    most = sa.select(sa.func.max(jobs.c.project_seconds)).scalar_subquery()
    found = connection.execute(sa.select(own, most).where(mine.c.id == job_id)).one()
    return max(found[0] or 0.0, (found[1] or 0.0) - time_slice) + LEAST_SECONDS


def must_give_way(job_id: str, now: Time) -> "sa.Select[bool]":
    """Return a query that says whether this running job should give way to another project's job.

    Consider the other projects whose waiting job would come before this project's jobs once this job stopped. A
    training or an evaluation gives way if there are more such projects than jobs that give way already. Merges
    never give way, since they have no checkpoints.
    """
    mine, own = jobs.alias(), _shares(now)
    other, all_ = own.alias(), own.alias()
    left = own.c.running - own.c.giving_way - 1
    is_first = sa.or_(other.c.running < left, sa.and_(other.c.running == left, other.c.seconds < own.c.seconds))
    waits = (other.c.lane == own.c.lane, other.c.project != own.c.project, other.c.waiting > 0, is_first)
    num_first = sa.select(sa.func.count()).select_from(other).where(*waits).scalar_subquery()
    giving_way = sa.select(sa.func.coalesce(sa.func.sum(all_.c.giving_way), 0)).where(all_.c.lane == TRAIN)
    query = sa.select(num_first > giving_way.scalar_subquery()).join_from(mine, own, _is_share_of(own, mine))
    return query.where(mine.c.id == job_id, own.c.lane == TRAIN)


def position() -> sa.ColumnElement[int | None]:
    """Return the SQL expression for a queued job's place in the queue, from 1; null for other jobs.

    The place counts the project's own older queued jobs, and other projects' jobs that come first, including
    running jobs that have to end or give way first. A job that may have to be claimed several times, since it
    gives way, counts once.
    """
    place = sa.func.row_number().over(partition_by=(jobs.c.project, lane_of(jobs)), order_by=jobs.c.number)
    queued = sa.select(jobs.c.id, place.label("place")).where(jobs.c.status == Status.QUEUED).subquery()
    own = _shares(None)
    other = own.alias()
    turn = own.c.running + queued.c.place  # the project's turn, counted from 1
    has_lead = sa.or_(
        other.c.running >= turn,
        other.c.seconds < own.c.seconds,
        sa.and_(other.c.seconds == own.c.seconds, other.c.first < own.c.first),
    )
    most = turn - sa.case((has_lead, 0), else_=1)
    unended = other.c.waiting + other.c.running
    before = sa.func.sum(sa.case((unended < most, unended), (other.c.project.is_not(None), most), else_=0))
    is_other = sa.and_(other.c.lane == own.c.lane, other.c.project != own.c.project)
    turns = sa.select(sa.cast(sa.func.min(queued.c.place) + before, sa.Integer))
    turns = turns.select_from(queued).join(own, _is_share_of(own, jobs)).outerjoin(other, is_other)
    turns = turns.where(queued.c.id == jobs.c.id).correlate(jobs)
    return sa.case((jobs.c.status == Status.QUEUED, turns.scalar_subquery()), else_=None)


def is_over(lease_until: "sa.ColumnElement[float]", now: Time) -> sa.ColumnElement[bool]:
    """Return the SQL condition that a lease that ends at `lease_until` has expired."""
    return sa.or_(lease_until <= now, lease_until > now + LONGEST_LEASE)


def _shares(now: Time | None) -> "sa.CTE":
    """Count each project's queued and running jobs in each lane, and look up the seconds that the project has
    used.

    A job whose lease has expired counts as waiting. If `now` is None, leases are ignored.
    """
    job = jobs.alias()
    runs: sa.ColumnElement[bool] = job.c.status == Status.RUNNING
    waits: sa.ColumnElement[bool] = job.c.status == Status.QUEUED
    if now is not None:
        waits = is_over(job.c.lease_until, now)
        runs = sa.and_(runs, sa.not_(waits))
    flags = [("waiting", waits), ("running", runs), ("giving_way", sa.and_(runs, job.c.gives_way))]
    columns = [sa.case((flag, 1), else_=0).label(name) for name, flag in flags]
    unended = sa.select(job.c.project, job.c.number, lane_of(job).label("lane"), *columns)
    rows = unended.where(_is_open(job)).subquery()
    sums = [sa.func.sum(rows.c[name]).label(name) for name, _ in flags]
    first = sa.func.min(sa.case((rows.c.waiting == 1, rows.c.number))).label("first")
    grouped = sa.select(rows.c.project, rows.c.lane, first, *sums).group_by(rows.c.project, rows.c.lane)
    share, other = grouped.subquery(), jobs.alias()
    used = sa.select(sa.func.max(other.c.project_seconds))
    used = used.where(other.c.project == share.c.project, lane_of(other) == share.c.lane)
    return sa.select(share, sa.func.coalesce(used.scalar_subquery(), 0.0).label("seconds")).cte("shares")


def _is_share_of(shares: "sa.FromClause", table: "sa.FromClause") -> sa.ColumnElement[bool]:
    return sa.and_(shares.c.project == table.c.project, shares.c.lane == lane_of(table))


def _is_open(table: "sa.FromClause") -> sa.ColumnElement[bool]:
    """Return the SQL condition that a job is queued or running."""
    return table.c.status.in_([Status.QUEUED, Status.RUNNING])
