"""Workers' time is shared among projects: the next job, the job that gives way, and the meaning of `position`."""

import pytest
import sqlalchemy as sa

from adapters.catalog.versions import Part
from adapters.merge_recipe import Recipe
from adapters.names import Viewpoint
from server.access.principal import Quota
from server.access.projects import Projects
from server.jobs.attempt import Attempt
from server.jobs.evaluate_spec import Candidate, EvaluateSpec
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import MAX_STALLED_ATTEMPTS, Claim, Directive, LeaseLost, Leases
from server.jobs.merge_spec import MergeSpec
from server.jobs.tables import MERGE, TRAIN
from tests.server.jobs.job_kit import submit

SLICE = 600.0
LEASE = 250.0


class Workers:
    """A queue with a clock that only tests move. Jobs are named after their projects: "a1" is project a's."""

    def __init__(self, engine: sa.Engine) -> None:
        self.now = 1e9
        self.jobs = Jobs(engine)
        for project in "abcxy":
            Projects(engine).put(project, Quota(), who="test")
        self.leases = Leases(engine, now=lambda: sa.literal(self.now, sa.Float(53)), time_slice=SLICE)
        self.held: dict[str, Claim] = {}

    def submit(self, *job_ids: str) -> None:
        for job_id in job_ids:
            submit(self.jobs.of(Viewpoint(job_id[0])), job_id)

    def submit_merge(self, job_id: str) -> None:
        spec = MergeSpec("merged", (Part("x", 1, "d" * 64, 1.0),), Recipe("ties", density=0.5))
        self.jobs.of(Viewpoint(job_id[0])).submit(spec, job_id=job_id, data={})

    def submit_evaluation(self, job_id: str) -> None:
        spec = EvaluateSpec((Candidate("base", ()),), ("ds",), ("loss",), 200)
        self.jobs.of(Viewpoint(job_id[0])).submit(spec, job_id=job_id, data={})

    def claim(self) -> str | None:
        """Let an idle worker claim a training; return the job's id."""
        claim = self.leases.claim("w", LEASE, TRAIN)
        if claim is None:
            return None
        self.held[claim.job_id] = claim
        return claim.job_id

    def run(self, seconds: float) -> None:
        """Let time pass in which all running jobs keep their leases."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + LEASE - 1, until)
            for claim in self.held.values():
                self.leases.heartbeat(claim, LEASE)

    def end(self, job_id: str) -> None:
        self.leases.fail(self.held.pop(job_id), "enough")

    def is_awaited(self, job_id: str) -> bool:
        return self.leases.is_awaited(self.held[job_id])

    def asked_to_give_way(self) -> list[str]:
        """Ask for each running job whether it should give way, in the order of claims; return the jobs that
        should."""
        for claim in self.held.values():
            self.leases.give_way(claim)
        return [name for name, claim in self.held.items() if self.leases.directive(claim) is Directive.GIVE_WAY]

    def give_way(self, job_id: str) -> None:
        """Requeue a job that was asked to give way."""
        claim = self.held.pop(job_id)
        assert self.leases.directive(claim) is Directive.GIVE_WAY
        self.leases.release(claim, gave_way_after=SLICE)

    def positions(self) -> dict[str, int | None]:
        return {job.id: job.position for job in reversed(self.jobs.list())}

    def turn(self, seconds: float = SLICE) -> str:
        """One worker's turn: the job that it takes runs for `seconds` and then gives way, if it should."""
        job_id = self.claim()
        assert job_id is not None
        self.run(seconds)
        if self.asked_to_give_way():
            self.give_way(job_id)
        return job_id


@pytest.fixture
def workers(engine: sa.Engine) -> Workers:
    return Workers(engine)


def test_long_jobs_of_three_projects_alternate(workers: Workers) -> None:
    workers.submit("a1", "b1", "c1")
    assert [workers.turn() for _ in range(7)] == ["a1", "b1", "c1", "a1", "b1", "c1", "a1"]


def test_a_project_with_short_jobs_waits_for_the_running_slice_alone(workers: Workers) -> None:
    """Two projects have jobs of days. Each short job starts as soon as the running job gives way."""
    workers.submit("a1", "c1")
    assert [workers.turn() for _ in range(2)] == ["a1", "c1"]
    for number in range(1, 6):
        long = workers.claim()
        assert long is not None
        workers.submit(short := f"b{number}")
        workers.run(SLICE)
        assert workers.asked_to_give_way() == [long]
        workers.give_way(long)
        assert workers.claim() == short
        workers.run(5)
        workers.end(short)


def test_training_alone_for_days_costs_nothing_later(workers: Workers) -> None:
    workers.submit("a1")
    assert workers.claim() == "a1"
    workers.run(6 * 3600)
    assert workers.asked_to_give_way() == []
    workers.submit("b1")
    assert workers.asked_to_give_way() == ["a1"]
    workers.give_way("a1")
    assert [workers.turn() for _ in range(4)] == ["b1", "a1", "b1", "a1"]


def test_paused_jobs_save_up_no_time(workers: Workers) -> None:
    """Two projects resume jobs that were paused for hours: the third project still gets every third turn."""
    workers.submit("x1", "y1", "a1")
    for job_id in ("x1", "y1"):
        workers.jobs.pause(job_id)
    assert workers.claim() == "a1"
    workers.run(6 * 3600)
    for job_id in ("x1", "y1"):
        workers.jobs.resume(job_id)
    assert workers.asked_to_give_way() == ["a1"]
    workers.give_way("a1")
    turns = [workers.turn() for _ in range(9)]
    assert [turns.count(job_id) for job_id in ("a1", "x1", "y1")] == [3, 3, 3]


def test_a_project_is_charged_for_attempts_that_crash(workers: Workers) -> None:
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    workers.run(300)
    workers.leases.crashed(workers.held.pop("a1"), "killed by SIGKILL", max_delay=0.0)
    assert workers.claim() == "b1"


def test_a_project_is_charged_for_a_worker_that_died(workers: Workers) -> None:
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    workers.run(300)
    workers.held.clear()
    workers.now += LEASE + 1
    assert [workers.claim() for _ in range(2)] == ["b1", "a1"]


def test_a_project_with_fewer_running_jobs_is_next(workers: Workers) -> None:
    workers.submit("b1")
    assert workers.claim() == "b1"
    workers.run(5000)
    workers.end("b1")
    workers.submit("a1", "a2", "b2")
    assert [workers.claim() for _ in range(2)] == ["a1", "b2"]


def test_a_job_gives_way_to_another_projects_alone(workers: Workers) -> None:
    workers.submit("a1")
    assert workers.claim() == "a1"
    workers.run(SLICE)
    assert not workers.is_awaited("a1")
    workers.submit("a2")
    workers.submit_merge("b1")
    assert not workers.is_awaited("a1")
    workers.submit("b2")
    assert workers.is_awaited("a1")
    workers.jobs.pause("b2")
    assert not workers.is_awaited("a1")


def test_a_merge_never_gives_way(workers: Workers) -> None:
    """It has no checkpoints: it would have to start again."""
    for job_id in ("a1", "b1"):
        workers.submit_merge(job_id)
    claim = workers.leases.claim("w", LEASE, MERGE)
    assert claim is not None
    workers.held["a1"] = claim
    workers.run(SLICE)
    assert not workers.is_awaited("a1")


def test_training_doesnt_delay_a_projects_merges(workers: Workers) -> None:
    workers.submit("a1")
    assert workers.claim() == "a1"
    workers.run(SLICE)
    for job_id in ("a2", "b1", "b2"):
        workers.submit_merge(job_id)
    claims = [workers.leases.claim("w", LEASE, MERGE) for _ in range(3)]
    assert [claim.job_id for claim in claims if claim is not None] == ["a2", "b1", "b2"]


def test_one_job_gives_way_for_each_project_that_waits(workers: Workers) -> None:
    """Of three workers, all with one project's jobs: each other project gets one, and no more."""
    workers.submit("a1", "a2", "a3")
    assert [workers.claim() for _ in range(3)] == ["a1", "a2", "a3"]
    workers.run(SLICE)
    workers.submit("b1", "b2")
    assert workers.asked_to_give_way() == ["a1"]
    assert not workers.is_awaited("a2")
    workers.submit("c1")
    assert workers.asked_to_give_way() == ["a1", "a2"]
    workers.give_way("a1")
    workers.give_way("a2")
    assert [workers.claim() for _ in range(2)] == ["b1", "c1"]
    assert workers.asked_to_give_way() == []


def test_projects_with_equally_many_workers_keep_them(workers: Workers) -> None:
    workers.submit("a1", "b1", "a2", "b2")
    assert [workers.claim() for _ in range(2)] == ["a1", "b1"]
    workers.run(2 * SLICE)
    assert workers.asked_to_give_way() == []


def test_an_odd_worker_changes_hands(workers: Workers) -> None:
    """Two projects and three workers: the third is one project's, then the other's."""
    workers.submit("a1", "a2", "b1", "b2")
    assert [workers.claim() for _ in range(3)] == ["a1", "b1", "a2"]
    for given, taken in (("a1", "b2"), ("b1", "a1"), ("a2", "b1")):
        workers.run(SLICE)
        assert workers.asked_to_give_way() == [given]
        workers.give_way(given)
        assert workers.claim() == taken
        assert workers.asked_to_give_way() == []


def test_a_job_that_gave_way_is_queued_and_says_so(workers: Workers, engine: sa.Engine) -> None:
    workers.submit("a1", "b1")
    claim = workers.leases.claim("w", LEASE, TRAIN)
    assert claim is not None
    workers.leases.give_way(claim)
    assert workers.leases.directive(claim) is workers.leases.heartbeat(claim) is Directive.GIVE_WAY
    workers.leases.release(claim, gave_way_after=SLICE)
    job = workers.jobs.get("a1")
    assert (job.status, job.is_pausing, job.finished_at) == (Status.QUEUED, False, None)
    last = workers.jobs.events("a1")[-1]
    assert (last.level, last.message) == (
        "info",
        "gave way to another project's job after 10 min; goes on at its turn",
    )
    assert workers.leases.directive(claim) is Directive.LOST
    with pytest.raises(LeaseLost):
        workers.leases.give_way(claim)


def test_a_pause_precedes_giving_way(workers: Workers) -> None:
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    assert workers.asked_to_give_way() == ["a1"]
    workers.jobs.pause("a1")
    claim = workers.held.pop("a1")
    assert workers.leases.directive(claim) is Directive.PAUSE
    workers.leases.release(claim, gave_way_after=5.0)
    assert workers.jobs.get("a1").status is Status.PAUSED
    assert workers.jobs.events("a1")[-1].message == "paused"
    workers.jobs.resume("a1")
    assert [workers.claim() for _ in range(2)] == ["b1", "a1"]
    assert workers.leases.directive(workers.held["a1"]) is Directive.GO_ON


def test_giving_way_counts_as_no_failed_attempt(workers: Workers) -> None:
    """However often it happens, and even if a step takes so long that there is no new checkpoint."""
    workers.submit("a1", "b1")
    for _ in range(2 * MAX_STALLED_ATTEMPTS + 2):
        job_id = workers.claim()
        assert job_id is not None
        while not workers.asked_to_give_way():
            workers.run(1)
        workers.give_way(job_id)
    assert {workers.jobs.get(job_id).attempt for job_id in ("a1", "b1")} == {MAX_STALLED_ATTEMPTS + 1}
    assert {workers.jobs.get(job_id).status for job_id in ("a1", "b1")} == {Status.QUEUED}


def test_a_worker_that_dies_while_its_job_gives_way_leaves_nothing_behind(workers: Workers) -> None:
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    assert workers.asked_to_give_way() == ["a1"]
    workers.held.clear()
    workers.now += LEASE + 1
    assert [workers.claim() for _ in range(2)] == ["b1", "a1"]
    assert workers.asked_to_give_way() == []


def test_positions_count_other_projects_turns(workers: Workers) -> None:
    """a1 gives way to b1, which c1 follows. Then a1 continues, and b2 waits for it. a2 waits for a1's end."""
    workers.submit("a1", "a2", "b1", "b2", "b3", "c1")
    assert workers.claim() == "a1"
    workers.run(SLICE)
    assert isinstance(workers.jobs.get("b1").position, int)  # a sum in PostgreSQL is a decimal
    assert workers.positions() == {"a1": None, "a2": 4, "b1": 2, "b2": 4, "b3": 6, "c1": 3}


def test_a_job_behind_a_long_one_is_second_until_the_worker_is_free(workers: Workers) -> None:
    workers.submit("a1", "b1")
    assert workers.positions() == {"a1": 1, "b1": 2}
    assert workers.claim() == "a1"
    assert workers.positions() == {"a1": None, "b1": 2}
    workers.run(SLICE)
    assert workers.asked_to_give_way() == ["a1"]
    workers.give_way("a1")
    assert workers.positions() == {"a1": 2, "b1": 1}
    assert workers.claim() == "b1"
    assert workers.positions() == {"a1": 2, "b1": None}


def test_positions_of_merges_and_trainings_are_apart(workers: Workers) -> None:
    workers.submit("a1", "b1")
    workers.submit_merge("b2")
    workers.submit_merge("b3")
    assert workers.positions() == {"a1": 1, "b1": 2, "b2": 1, "b3": 2}


def attempt_at(workers: Workers, job_id: str) -> Attempt:
    return Attempt(
        workers.leases, workers.held[job_id], lease=LEASE, heartbeat=1.0, look=1.0, clock=lambda: workers.now
    )


def looks(workers: Workers, attempt: Attempt) -> list[Directive]:
    """Let an attempt look twice for other projects' jobs; return what its job is asked after each look."""
    found = []
    for _ in range(2):
        attempt.keep()
        attempt.give_way_if_awaited()
        found.append(workers.leases.directive(attempt.claim))
    return found


def test_a_slice_ends_with_the_first_step_if_that_takes_longer(workers: Workers) -> None:
    """So each turn makes progress, however long loading the base and the first step take."""
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    attempt = attempt_at(workers, "a1")
    workers.run(10 * SLICE)
    attempt.note(None, None)
    assert looks(workers, attempt) == [Directive.GO_ON] * 2
    attempt.note({"step": 1}, {})
    assert looks(workers, attempt) == [Directive.GIVE_WAY] * 2
    assert attempt.seconds == 10 * SLICE


def test_a_slice_starts_with_the_attempt(workers: Workers) -> None:
    """Its start-up counts, so that another project's job waits for one slice and a step."""
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    attempt = attempt_at(workers, "a1")
    workers.run(SLICE - 1)
    attempt.note({"step": 1}, {})
    assert looks(workers, attempt) == [Directive.GO_ON] * 2
    workers.run(1)
    assert looks(workers, attempt) == [Directive.GIVE_WAY] * 2


def test_an_idle_worker_takes_a_new_job_before_another_gives_way(workers: Workers) -> None:
    """A job gives way only if another waited at the last look, too: seconds after an idle worker's look."""
    workers.submit("a1")
    assert workers.claim() == "a1"
    attempt = attempt_at(workers, "a1")
    attempt.note({"step": 1}, {})
    workers.run(SLICE)
    assert looks(workers, attempt) == [Directive.GO_ON] * 2
    workers.submit("b1")
    assert looks(workers, attempt) == [Directive.GO_ON, Directive.GIVE_WAY]


def test_without_a_time_slice_no_job_gives_way(workers: Workers) -> None:
    workers.leases.time_slice = 0.0
    workers.submit("a1", "b1")
    assert workers.claim() == "a1"
    attempt = attempt_at(workers, "a1")
    attempt.note({"step": 1}, {})
    workers.run(10 * SLICE)
    assert looks(workers, attempt) == [Directive.GO_ON] * 2


def test_evaluations_take_turns_with_trainings(workers: Workers) -> None:
    """They count towards the same time, wait for older jobs, and give way. Merges are in a lane of their own."""
    workers.submit("a1", "b1")
    workers.submit_evaluation("a2")
    assert workers.jobs.get("a2").position == 3
    assert workers.leases.claim("w", LEASE, MERGE) is None
    assert [workers.turn() for _ in range(2)] == ["a1", "b1"]
    assert workers.claim() == "a1"
    workers.end("a1")
    assert workers.claim() == "b1"
    workers.end("b1")
    workers.submit("b2")
    assert workers.claim() == "a2"
    workers.run(SLICE)
    assert workers.asked_to_give_way() == ["a2"]
