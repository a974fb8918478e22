"""The queue: order, leases and fencing, all or nothing on success, and what people may ask of a job."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from adapters.catalog.catalog import Catalog, NewVersion, publish_in
from adapters.catalog.records import Recorder, Records
from adapters.errors import Conflict, InvalidInput, NotFound
from adapters.expression import Term
from adapters.names import Viewpoint
from server.access.principal import Quota
from server.access.projects import Projects
from server.database.clock import database_time
from server.errors import QueueFull
from server.jobs import tables as job_tables
from server.jobs.files import leased
from server.jobs.jobs import STOP_STEP, Job, Jobs, Status
from server.jobs.leases import MAX_STALLED_ATTEMPTS, Claim, Directive, LeaseLost, Leases
from server.training.spec import JobSpec, LoraSpec
from tests.server.jobs.job_kit import submit

NEW = NewVersion(
    name="tweets",
    digest="d" * 64,
    rank=4,
    alpha=8,
    target_modules=("q_proj",),
    parameters=1,
    bytes=1,
    metrics={"eval_loss": 1.5},
)


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> sa.ColumnElement[float]:
        return sa.literal(self.now, sa.Float(53))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(engine: sa.Engine, clock: Clock) -> Leases:
    """A lease of 0 seconds has run out at once."""
    return Leases(engine, now=clock)


def claim_first(leases: Leases, lease_seconds: float = 60.0, owner: str = "w") -> Claim:
    claim = leases.claim(owner, lease_seconds)
    assert claim is not None
    return claim


def succeed(leases: Leases, claim: Claim, publish: NewVersion | None = NEW, alias: str | None = None) -> object:
    return leases.succeed(
        claim, progress={"step": 9}, metrics={"eval_loss": 1.5}, report={"wall": 3}, publish=publish, alias=alias
    )


def messages(jobs: Jobs, job_id: str) -> list[str]:
    return [event.message for event in jobs.events(job_id)]


def test_a_job_comes_back_as_it_was_submitted(jobs: Jobs) -> None:
    spec = JobSpec(
        name="tweets",
        lora=LoraSpec(rank=8, target_modules=("q_proj",)),
        start_from="a@1",
        alias="prod",
        description="é",
    )
    before = datetime.now(UTC)
    job = jobs.submit(spec, job_id="j1", data={"num_rows": 7, "digest": "x"})
    assert job == jobs.get("j1")
    assert job == Job(
        id="j1",
        project="default",
        key_id=None,
        name="tweets",
        status=Status.QUEUED,
        spec=spec,
        data={"num_rows": 7, "digest": "x"},
        progress={},
        metrics={},
        adapter=None,
        error=None,
        created_at=job.created_at,
        started_at=None,
        finished_at=None,
        files_removed_at=None,
        attempt=0,
        position=1,
        is_pausing=False,
    )
    assert before <= job.created_at <= datetime.now(UTC)
    assert jobs.report("j1") is None
    assert messages(jobs, "j1") == ["queued"]


def test_what_is_not_there(jobs: Jobs) -> None:
    submit(jobs, "j1")
    calls: list[Callable[[str], object]] = [
        jobs.get,
        jobs.events,
        jobs.report,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call("j2")


def test_lists_have_the_newest_first(jobs: Jobs, leases: Leases) -> None:
    for i in range(5):
        submit(jobs, f"j{i}")
    claim_first(leases)
    jobs.cancel("j3")

    def ids(**page: Any) -> list[str]:
        return [job.id for job in jobs.list(**page)]

    assert ids() == ["j4", "j3", "j2", "j1", "j0"]
    assert ids(limit=2) == ["j4", "j3"]
    assert ids(limit=2, before="j3") == ["j2", "j1"]
    assert ids(status=Status.QUEUED) == ["j4", "j2", "j1"]
    assert ids(status=Status.RUNNING) == ["j0"]
    assert ids(status=Status.PAUSED) == []
    assert {job.id: job.position for job in jobs.list()} == {"j0": None, "j1": 1, "j2": 2, "j3": None, "j4": 3}


def test_a_key_makes_a_repeat_return_the_first_job(jobs: Jobs) -> None:
    def send(job_id: str, key: str, body: str) -> Job:
        return jobs.submit(JobSpec("a"), job_id=job_id, data={}, idempotency_key=key, body_digest=body)

    assert jobs.repeated("k", "body") is None
    first = send("j1", "k", "body")
    assert send("j2", "k", "body") == first
    assert jobs.repeated("k", "body") == first
    assert jobs.repeated(None, "body") is None
    assert send("j3", "other", "body").id == "j3"
    calls: list[Callable[[], object]] = [
        lambda: send("j4", "k", "other body"),
        lambda: jobs.repeated("k", "other body"),
    ]
    for call in calls:
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.errors[0].loc == ("Idempotency-Key",)
    assert [job.id for job in jobs.list()] == ["j3", "j1"]
    jobs.cancel("j1")
    assert send("j5", "k", "body").id == "j1"


def test_a_key_counts_once_however_many_come_at_once(jobs: Jobs) -> None:
    def send(i: int) -> str:
        return jobs.submit(JobSpec("a"), job_id=f"j{i}", data={}, idempotency_key="k", body_digest="b").id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(send, range(16)))) == 1
    assert len(jobs.list()) == 1


def test_the_queue_is_bounded(engine: sa.Engine, leases: Leases) -> None:
    jobs = Jobs(engine, max_unfinished=2)
    jobs.submit(JobSpec("a"), job_id="j1", data={}, idempotency_key="k")
    claim = claim_first(leases)
    submit(jobs, "j2")
    with pytest.raises(QueueFull) as caught:
        submit(jobs, "j3")
    assert caught.value.retry_after > 0
    assert jobs.submit(JobSpec("a"), job_id="j3", data={}, idempotency_key="k").id == "j1"
    leases.fail(claim, "no")
    submit(jobs, "j3")


def test_claims_go_by_submission(jobs: Jobs, leases: Leases) -> None:
    for i in range(3):
        submit(jobs, f"j{i}")
    assert [claim_first(leases, owner=f"w{i}") for i in range(3)] == [Claim(f"j{i}", 1, f"w{i}") for i in range(3)]
    assert leases.claim("w") is None
    job = jobs.get("j0")
    assert (job.status, job.attempt, job.position) == (Status.RUNNING, 1, None)
    assert job.started_at is not None
    assert messages(jobs, "j0") == ["queued", "started"]


def test_a_job_is_claimed_once_however_many_want_it(jobs: Jobs, leases: Leases) -> None:
    for i in range(20):
        submit(jobs, f"j{i}")

    def take(i: int) -> list[str]:
        taken = []
        while (claim := leases.claim(f"w{i}", 60)) is not None:
            taken.append(claim.job_id)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for found in pool.map(take, range(8)) for job_id in found]
    assert sorted(taken) == sorted(f"j{i}" for i in range(20))


def test_a_lease_runs_out_unless_it_is_kept(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    submit(jobs, "j1")
    first = claim_first(leases, 10)
    for _ in range(4):
        clock.now += 9
        assert leases.heartbeat(first, 10, {"step": 1}, {"train_loss": 2.0}) is Directive.GO_ON
    clock.now += 9.9
    assert leases.claim("w2", 60) is None
    clock.now += 0.2
    second = claim_first(leases, 60, "w2")
    assert second == Claim("j1", 2, "w2")
    job = jobs.get("j1")
    assert (job.attempt, job.progress, job.metrics) == (2, {"step": 1}, {"train_loss": 2.0})
    assert jobs.events("j1")[-1].message == "its worker stopped answering; started again (attempt 2)"
    assert jobs.events("j1")[-1].level == "warning"


def test_a_clock_that_was_set_back_holds_no_job_up(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    """Neither one whose worker is gone, whose lease is in the future now, nor one that was put back before."""
    for job_id in ("j1", "j2"):
        submit(jobs, job_id)
    claim_first(leases, 10)
    leases.release(claim_first(leases, 10))
    clock.now -= 86_400
    assert [claim_first(leases, 10, "w2").job_id for _ in range(2)] == ["j1", "j2"]
    assert leases.claim("w2", 10) is None


def test_a_lease_of_a_clock_that_was_set_back_is_nobodys(jobs: Jobs, engine: sa.Engine) -> None:
    """Nor does it keep the jobs of a cluster from being moved."""
    submit(jobs, "j1")
    claim_first(Leases(engine), 10)
    assert (leased(engine), jobs.owners()) == (["j1"], {"w"})
    with engine.begin() as connection:
        lease_until = job_tables.jobs.c.lease_until
        connection.execute(sa.update(job_tables.jobs).values(lease_until=lease_until + 86_400))
    assert (leased(engine), jobs.owners()) == ([], set())


def test_turns_go_on_after_a_clock_was_set_back(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    for project in ("acme", "other"):
        Projects(jobs._engine).put(project, Quota(), who="test")
    acme, other = (jobs.of(Viewpoint(project)) for project in ("acme", "other"))
    for of, job_id in ((acme, "a1"), (acme, "a2"), (other, "b1"), (other, "b2")):
        submit(of, job_id)
    leases.fail(claim_first(leases), "enough")
    clock.now -= 86_400
    assert [claim_first(leases).job_id for _ in range(3)] == ["b1", "a2", "b2"]


def run_seconds(engine: sa.Engine) -> float:
    """Of the only job."""
    with engine.connect() as connection:
        found: float = connection.execute(sa.select(job_tables.jobs.c.run_seconds)).scalar_one()
    return found


def test_a_job_whose_worker_died_costs_no_more_than_its_lease(
    jobs: Jobs, leases: Leases, engine: sa.Engine
) -> None:
    """By a clock that stands long before the database's, which cancels."""
    submit(jobs, "j1")
    claim_first(leases, 60)
    jobs.cancel("j1")
    assert run_seconds(engine) == 60


def test_time_while_a_worker_was_stopped_does_not_count(
    jobs: Jobs, leases: Leases, engine: sa.Engine, clock: Clock
) -> None:
    """Neither by the heartbeat after it nor by the next one; nor does a clock that was set back take time back."""
    submit(jobs, "j1")
    claim = claim_first(leases, 10)
    clock.now += 8
    leases.heartbeat(claim, 10)
    assert run_seconds(engine) == 8
    clock.now += 1000
    leases.heartbeat(claim, 10)
    assert run_seconds(engine) == 8 + 10
    clock.now += 4
    leases.heartbeat(claim, 0)
    assert run_seconds(engine) == 8 + 10 + 4
    clock.now += 5
    leases.heartbeat(claim, 10)
    clock.now -= 3
    leases.heartbeat(claim, 10)
    assert run_seconds(engine) == 8 + 10 + 4
    clock.now += 2
    leases.release(claim)
    assert run_seconds(engine) == 8 + 10 + 4 + 2


def test_hindered_attempts_are_reported_and_not_counted(
    jobs: Jobs, leases: Leases, engine: sa.Engine, clock: Clock
) -> None:
    submit(jobs, "j1")
    for token in range(1, MAX_STALLED_ATTEMPTS + 2):
        leases.release(claim_first(leases), "the store was away", delay=30.0)
        messages = [(event.level, event.message) for event in jobs.events("j1", limit=1000)]
        assert messages[-2:] == [
            ("warning", f"attempt {token}: the store was away"),
            ("info", "back in the queue"),
        ]
        clock.now += 29.0
        assert leases.claim("w") is None
        clock.now += 1.5
    assert jobs.get("j1").status is Status.QUEUED


def test_a_worker_that_lost_its_lease_changes_nothing(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    submit(jobs, "j1")
    stale = claim_first(leases, 0.0)
    claim_first(leases)
    before = jobs.get("j1"), jobs.events("j1")
    writes: list[Callable[[], object]] = [
        lambda: leases.add_event(stale, "x"),
        lambda: leases.add_metrics(stale, "x", {"step": 1}),
        lambda: leases.checkpointed(stale, 1),
        lambda: succeed(leases, stale),
        lambda: leases.fail(stale, "x"),
        lambda: leases.release(stale),
        lambda: leases.crashed(stale, "x"),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert leases.heartbeat(stale, 60, {"step": 5}) is Directive.LOST
    assert leases.directive(stale) is Directive.LOST
    assert (jobs.get("j1"), jobs.events("j1")) == before
    assert Catalog(engine).list() == []


def test_a_worker_that_comes_back_before_others_goes_on(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    claim = claim_first(leases, 0.0)
    assert leases.heartbeat(claim, 60) is Directive.GO_ON
    assert leases.claim("w2") is None
    succeed(leases, claim)


def test_success_publishes_and_ends_the_job_in_one(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    catalog = Catalog(engine)
    catalog.publish("tweets", digest="0" * 64, rank=1, alpha=1, target_modules=(), parameters=1, bytes=1)
    submit(jobs, "j1")
    version = succeed(leases, claim_first(leases), alias="prod")
    assert version == catalog.version("tweets", 2)
    assert catalog.version("tweets", 2).job_id == "j1"
    assert catalog.resolve([Term("tweets"), Term("tweets", alias="prod")])[1].version == 2
    assert catalog.get("tweets").latest == 2
    job = jobs.get("j1")
    assert job.status is Status.SUCCEEDED
    assert job.adapter == {"name": "tweets", "version": 2, "digest": "d" * 64, "moves_latest": True}
    assert (job.progress, job.metrics) == ({"step": 9}, {"eval_loss": 1.5})
    assert jobs.report("j1") == {"wall": 3, "moves_latest": True}
    assert job.finished_at is not None
    assert jobs.events("j1")[-1].message == "succeeded: tweets@2"
    submit(jobs, "j2")
    succeed(leases, claim_first(leases), alias="prod")  # the alias moves
    assert catalog.get("tweets").aliases == {"prod": 3}


def test_success_is_all_or_nothing(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    submit(jobs, "j1")
    claim = claim_first(leases)
    before = jobs.get("j1"), jobs.events("j1")
    faults: list[dict[str, Any]] = [{"name": "base"}, {"metrics": {"x": float("nan")}}, {"rank": None}]
    for fault in faults:
        new = replace(NEW, **fault)
        with pytest.raises((InvalidInput, ValueError, sa.exc.IntegrityError)):
            succeed(leases, claim, new, "prod")
    with pytest.raises(ValueError, match="JSON"):
        leases.succeed(claim, progress={}, metrics={}, report={"x": float("inf")}, publish=NEW)
    assert (jobs.get("j1"), jobs.events("j1")) == before
    assert Catalog(engine).list() == []
    succeed(leases, claim)
    assert Catalog(engine).get("tweets").latest == 1
    with pytest.raises(LeaseLost):
        succeed(leases, claim)
    assert len(Catalog(engine).get("tweets").versions) == 1


def test_a_job_that_was_cancelled_is_not_published_after_all(
    jobs: Jobs, leases: Leases, engine: sa.Engine, tmp_path: Path
) -> None:
    """Its worker was killed between the version's record and the commit, and the user didn't wait for another."""
    records = Records(tmp_path / "adapters")
    submit(jobs, "j1")
    claim = claim_first(leases)
    with engine.connect() as connection:  # which is closed without a commit
        publish_in(connection, replace(NEW, job_id=claim.job_id), records=Recorder(records))
    assert len(records.read().versions) == 1
    jobs.cancel("j1")
    catalog = Catalog(engine, records)
    assert catalog.recover(lambda digest: True, jobs.is_known).num_dropped == 1
    assert catalog.list() == []
    assert records.read().versions == ()


def test_many_publish_one_new_name_at_once(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    for i in range(8):
        submit(jobs, f"j{i}")
    claims = [claim_first(leases) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda claim: succeed(leases, claim, alias="prod"), claims))
    versions = Catalog(engine).get("tweets").versions
    assert [version.version for version in versions] == list(range(1, 9))
    assert {version.job_id for version in versions} == {f"j{i}" for i in range(8)}


def test_a_gate_that_was_not_passed_publishes_nothing(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    submit(jobs, "j1")
    assert succeed(leases, claim_first(leases), publish=None) is None
    job = jobs.get("j1")
    assert (job.status, job.adapter, job.error) == (Status.SUCCEEDED, None, None)
    assert Catalog(engine).list() == []


def test_a_failure_keeps_its_reason(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    leases.fail(claim_first(leases), "the loss is no number; lower the learning rate")
    job = jobs.get("j1")
    assert (job.status, job.error) == (Status.FAILED, "the loss is no number; lower the learning rate")
    assert job.finished_at is not None
    last = jobs.events("j1")[-1]
    assert (last.level, last.message) == ("error", job.error)
    assert leases.claim("w") is None


def test_no_steps_metrics_are_stored_twice(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")

    def run(claim: Claim, steps: range) -> None:
        for step in steps:
            leases.add_metrics(claim, f"step {step}", {"step": step, "loss": 1 / step})

    first = claim_first(leases, 0.0)
    run(first, range(1, 8))
    leases.checkpointed(first, 4)
    second = claim_first(leases)
    leases.add_event(second, "goes on from step 4", data={"step": 4})
    run(second, range(5, 10))
    leases.flush(second)
    found = jobs.events("j1", limit=100)
    assert [event.data["step"] for event in found if event.type == "metrics"] == list(range(1, 10))
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert jobs.events("j1", after=3, limit=2) == found[3:5]
    assert jobs.events("j1", after=len(found)) == []
    assert found[2].data == {"step": 1, "loss": 1.0}
    with pytest.raises(ValueError, match="JSON"):
        leases.add_metrics(second, "x", {"step": 10, "loss": float("nan")})


def test_metrics_are_stored_in_batches_and_in_order(
    jobs: Jobs, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one transaction a second; and all of them before any other event of the job, or its checkpoint."""
    submit(jobs, "j1")
    claim = claim_first(leases)

    def steps() -> list[object]:
        return [event.data["step"] for event in jobs.events("j1", limit=100) if event.type == "metrics"]

    monkeypatch.setattr("server.jobs.leases.METRICS_SECONDS", 3600.0)
    for step in range(1, 4):
        leases.add_metrics(claim, f"step {step}", {"step": step})
    assert steps() == [1]
    leases.flush_if_due(claim)
    assert steps() == [1]
    leases.checkpointed(claim, 3)
    assert steps() == [1, 2, 3], "they won't be computed again"
    leases.add_metrics(claim, "step 4", {"step": 4})
    leases.add_event(claim, "something")
    assert jobs.events("j1", limit=100)[-1].message == "something"
    assert steps() == [1, 2, 3, 4]
    leases.add_metrics(claim, "step 5", {"step": 5})
    monkeypatch.setattr("server.jobs.leases.METRICS_SECONDS", 0.0)
    leases.flush_if_due(claim)
    assert steps() == [1, 2, 3, 4, 5]
    monkeypatch.setattr("server.jobs.leases.METRICS_SECONDS", 3600.0)
    leases.add_metrics(claim, "step 6", {"step": 6})
    leases.fail(claim, "over")
    assert [event.message for event in jobs.events("j1", limit=100)[-2:]] == ["step 6", "over"]


def test_attempts_count_where_no_new_checkpoint_was_made(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")

    def crash() -> None:
        leases.crashed(claim_first(leases), "killed by SIGKILL", max_delay=0.0)

    for _ in range(20):
        crash()
    claim = claim_first(leases)
    leases.checkpointed(claim, 10)
    leases.crashed(claim, "killed by SIGKILL", max_delay=0.0)
    for _ in range(24):
        crash()
    claim = claim_first(leases)
    leases.checkpointed(claim, 10)  # no new one
    leases.release(claim)  # as asked: doesn't count
    crash()
    assert jobs.get("j1").status is Status.QUEUED
    assert leases.claim("w") is None
    job = jobs.get("j1")
    assert job.status is Status.FAILED
    assert job.error == "25 attempts in a row made no new checkpoint; the last one: killed by SIGKILL"
    assert jobs.events("j1")[-1].message == job.error


def test_a_crash_lets_others_go_first_for_a_moment(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    submit(jobs, "j1")
    submit(jobs, "j2")
    for _ in range(3):
        leases.crashed(claim_first(leases), "ended with exit code 1", max_delay=0.0)
    claim = claim_first(leases)
    leases.crashed(claim, "ended with exit code 1")  # the fourth in a row: 0.1 · 2⁴ s
    job = jobs.get("j1")
    assert (job.status, job.error, job.position) == (Status.QUEUED, None, 1)
    assert "attempt 4: ended with exit code 1" in messages(jobs, "j1")
    assert claim_first(leases).job_id == "j2"
    clock.now += 1.59
    assert leases.claim("w") is None
    clock.now += 0.02
    assert leases.claim("w") == Claim("j1", 5, "w")


def test_what_is_released_goes_back_to_its_old_place(jobs: Jobs, leases: Leases) -> None:
    for i in range(3):
        submit(jobs, f"j{i}")
    claim = claim_first(leases)
    leases.release(claim)
    assert [jobs.get(f"j{i}").position for i in range(3)] == [1, 2, 3]
    assert leases.directive(claim) is Directive.LOST
    assert claim_first(leases).job_id == "j0"


def test_pause_and_resume(jobs: Jobs, leases: Leases) -> None:
    for i in range(3):
        submit(jobs, f"j{i}")
    assert jobs.pause("j1").status is Status.PAUSED  # it waited
    assert jobs.pause("j1").status is Status.PAUSED
    claim = claim_first(leases)
    job = jobs.pause("j0")
    assert (job.status, job.is_pausing) == (Status.RUNNING, True)
    assert jobs.pause("j0") == job
    assert leases.directive(claim) is leases.heartbeat(claim) is Directive.PAUSE
    leases.release(claim)
    job = jobs.get("j0")
    assert (job.status, job.is_pausing, job.position) == (Status.PAUSED, False, None)
    assert claim_first(leases).job_id == "j2"
    assert jobs.resume("j1").position == 1
    assert jobs.resume("j0").position == 1
    assert jobs.resume("j0").status is Status.QUEUED
    assert [claim_first(leases).job_id for _ in range(2)] == ["j0", "j1"]
    assert messages(jobs, "j0") == [
        "queued",
        "started",
        "pausing",
        "paused",
        "resumed",
        "started again (attempt 2)",
    ]


def test_a_training_ends_early_after_its_step(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    with pytest.raises(Conflict, match="hasn't completed a step"):
        jobs.stop("j1")
    claim = claim_first(leases)
    leases.heartbeat(claim, progress={"step": 3})
    jobs.stop("j1")
    leases.heartbeat(claim, progress={"step": 4})
    assert jobs.stop("j1").data[STOP_STEP] == 3  # again, which changes nothing
    assert leases.directive(claim) is Directive.GIVE_WAY
    leases.release(claim, gave_way_after=5.0)
    assert jobs.get("j1").status is Status.QUEUED
    assert messages(jobs, "j1") == ["queued", "started", "ending early, after step 3", "back in the queue"]
    assert leases.directive(claim_first(leases)) is Directive.GO_ON
    jobs.pause("j1")
    jobs.cancel("j1")
    with pytest.raises(Conflict, match="has ended"):
        jobs.stop("j1")


def test_a_paused_training_ends_early(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    claim = claim_first(leases)
    leases.heartbeat(claim, progress={"step": 3})
    jobs.pause("j1")
    leases.release(claim)
    assert jobs.stop("j1").status is Status.QUEUED
    assert claim_first(leases).job_id == "j1"


def test_a_pause_can_be_taken_back(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    claim = claim_first(leases)
    jobs.pause("j1")
    assert jobs.resume("j1").is_pausing is False
    assert leases.directive(claim) is Directive.GO_ON
    leases.release(claim)  # it was on its way out
    assert jobs.get("j1").status is Status.QUEUED


def test_a_pause_outlives_the_worker(jobs: Jobs, leases: Leases) -> None:
    for job_id in ("j1", "j2"):
        submit(jobs, job_id)
        claim = claim_first(leases, 0.0)
        jobs.pause(job_id)
        if job_id == "j2":
            leases.crashed(claim, "killed by SIGKILL")
        assert leases.claim("w2") is None
        assert jobs.get(job_id).status is Status.PAUSED
        assert leases.directive(claim) is Directive.LOST


def test_cancel_ends_a_job_at_once(jobs: Jobs, leases: Leases, engine: sa.Engine) -> None:
    for i in range(3):
        submit(jobs, f"j{i}")
    claim = claim_first(leases)
    jobs.pause("j1")
    for i in range(3):
        job = jobs.cancel(f"j{i}")
        assert job.status is Status.CANCELLED
        assert job.finished_at is not None
    assert leases.directive(claim) is leases.heartbeat(claim) is Directive.CANCEL
    with pytest.raises(LeaseLost):
        succeed(leases, claim)
    assert Catalog(engine).list() == []
    assert leases.claim("w") is None


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_what_has_ended_stays_so(jobs: Jobs, leases: Leases, end: str) -> None:
    submit(jobs, "j1")
    claim = claim_first(leases, 0.0)
    ends: dict[str, Callable[[], object]] = {
        "succeed": lambda: succeed(leases, claim),
        "fail": lambda: leases.fail(claim, "no"),
        "cancel": lambda: jobs.cancel("j1"),
    }
    ends[end]()
    assert leases.directive(claim) is (Directive.CANCEL if end == "cancel" else Directive.ENDED)
    before = jobs.get("j1"), jobs.events("j1")
    for steer in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(Conflict, match=f"ended already: {before[0].status}"):
            steer("j1")
    assert leases.claim("w") is None
    assert (jobs.get("j1"), jobs.events("j1")) == before
    assert before[0].status.has_ended


def test_what_a_job_needs_is_in_use_until_it_ends(jobs: Jobs, leases: Leases) -> None:
    spec = JobSpec("a", start_from="b@1", start_from_digest="d" * 64)
    jobs.submit(spec, job_id="j1", data={}, used=["ds-1", "ds-2", "ds-1"])
    jobs.submit(JobSpec("a"), job_id="j2", data={}, used=["ds-2"])
    assert all(map(jobs.in_use, ["ds-1", "ds-2", "d" * 64]))
    assert not jobs.in_use("ds-3")
    leases.fail(claim_first(leases), "no")
    assert [jobs.in_use(used) for used in ("ds-1", "ds-2", "d" * 64)] == [False, True, False]
    jobs.pause("j2")
    assert jobs.in_use("ds-2")
    jobs.cancel("j2")
    assert not jobs.in_use("ds-2")


def test_status_is_one_read(jobs: Jobs, leases: Leases) -> None:
    submit(jobs, "j1")
    assert leases.status("j1") is Status.QUEUED
    assert leases.status("j2") is None


def test_the_tables_are_postgresql_too() -> None:
    dialect = postgresql.dialect()
    for table in job_tables.metadata.sorted_tables:
        assert "CREATE TABLE" in str(sa.schema.CreateTable(table).compile(dialect=dialect))
    assert "clock_timestamp()" in str(sa.select(database_time()).compile(dialect=dialect))


def test_the_clock_is_the_databases(engine: sa.Engine, jobs: Jobs) -> None:
    before = time.time()
    with engine.connect() as connection:
        now = connection.execute(sa.select(database_time())).scalar_one()
    assert before - 1.0 < now < time.time() + 1.0
    submit(jobs, "j1")
    claim_first(Leases(engine), 60)
    with engine.connect() as connection:
        until = connection.execute(sa.select(job_tables.jobs.c.lease_until)).scalar_one()
    assert 30 < until - time.time() <= 60


def test_nul_is_refused_in_fields_and_removed_from_messages(jobs: Jobs, leases: Leases) -> None:
    """PostgreSQL stores none in a text, and can't look into a document that has one."""
    with pytest.raises(InvalidInput, match=r"^data\.source\.name: must not have NUL"):
        jobs.submit(JobSpec(name="x"), job_id="j1", data={"source": {"kind": "\\u0000", "name": "a\0b"}})
    jobs.submit(JobSpec(name="x"), job_id="j2", data={"source": {"name": "\\u0000"}})
    claim = claim_first(leases)
    leases.add_event(claim, "a\0b", data={"sample": "c\0d"})
    leases.fail(claim, "e\0f")
    assert jobs.get("j2").error == "e\N{REPLACEMENT CHARACTER}f"
    assert [event.message for event in jobs.events("j2")][2] == "a\N{REPLACEMENT CHARACTER}b"
    assert jobs.events("j2")[2].data == {"sample": "c\0d"}
