"""Engine time by project: equal shares, no savings, and light projects undisturbed by heavy ones."""

import random
import time
from collections.abc import Sequence as Seq
from typing import TypedDict, Unpack

import pytest

from server.engine.request import GenerationRequest, SamplingParams
from server.engine.runner import Drawn, Runner
from server.engine.scheduler import QUICK_STEP
from server.engine.sequence import Chunk, Sequence, Status
from server.engine.shares import SLACK, ProjectShares
from server.model.base.weights import BaseModel
from tests.kits.engines import build_engine
from tests.server.engine.simulation import Simulation
from tests.server.engine.small import simulation, unlike


class Options(TypedDict, total=False):
    """Options of `simulation` that these tests set."""

    num_blocks: int
    capacity: int
    max_num_seqs: int
    chunk_size: int
    max_prefill_tokens: int
    drafts: bool


def chunk(project: str, num_tokens: int = 1) -> Chunk:
    request = GenerationRequest("r", tuple(range(1000)), SamplingParams(), project=project)
    return Chunk(Sequence(request, 0, 0.0, 16), 0, num_tokens)


def entered(*projects: str) -> ProjectShares:
    shares = ProjectShares()
    for project in projects:
        shares.enter(project)
    return shares


def seconds_of(num_tokens: int) -> float:
    """Return the seconds of a step: about what the embedded base takes on two cores."""
    return 0.004 + 0.00125 * num_tokens


def timed(**options: Unpack[Options]) -> Simulation:
    sim, _ = simulation(**options)
    sim.step_seconds = seconds_of
    return sim


def add(
    sim: Simulation, project: str, num: int, max_tokens: int, *digests: str, length: int = 4
) -> list[Sequence]:
    return [
        sim.add(unlike(sim.rng.randrange(10**6), length), max_tokens, digests, project=project)[0]
        for _ in range(num)
    ]


def seconds_to_finish(sim: Simulation, sequence: Sequence) -> float:
    begun = sim.seconds
    while sequence not in sim.finished:
        sim.step()
        assert sim.seconds - begun < 600, "it starves"
    return sim.seconds - begun


def test_a_step_is_charged_by_tokens() -> None:
    shares = entered("a", "b")
    shares.charge([chunk("a", 3), chunk("b", 1)], 0.2, ["a", "b"])
    assert shares.lead("a", "b") == pytest.approx(0.2 * 3 / 4 - 0.2 * 1 / 4)


def test_a_project_ahead_by_the_slack_sits_out_until_others_catch_up() -> None:
    shares = entered("a", "b")
    shares.charge([chunk("a")], SLACK * 0.9, ["a", "b"])
    assert shares.due(["a", "b"]) == {"a", "b"}
    shares.charge([chunk("a")], SLACK * 0.2, ["a", "b"])
    assert shares.due(["a", "b"]) == {"b"}
    shares.charge([chunk("b")], SLACK, ["a", "b"])
    assert shares.due(["a", "b"]) == {"b"}
    shares.charge([chunk("b")], SLACK * 0.2, ["a", "b"])
    assert shares.due(["a", "b"]) == {"a", "b"}


def test_a_new_project_starts_behind_the_running_ones_by_the_slack() -> None:
    shares = entered("heavy")
    shares.charge([chunk("heavy")], 100.0, ["heavy"])
    for number in range(50):
        shares.enter(f"light{number}")
        assert shares.lead("heavy", f"light{number}") == pytest.approx(SLACK)
    assert shares.due(["heavy", "light0"]) == {"light0"}


def test_idle_time_is_not_saved_up() -> None:
    shares = entered("a", "b")
    shares.charge([chunk("b")], 1.0, ["a", "b"])
    for _ in range(100):
        shares.charge([chunk("a")], 1.0, ["a"])  # b has nothing running
    shares.enter("b")
    assert shares.lead("a", "b") == pytest.approx(SLACK)


def test_requests_one_after_the_other_earn_no_new_credit() -> None:
    """A project that always has something running, in short requests, gets half of the time and no more."""
    shares = entered("heavy", "often")
    used = {"heavy": 0.0, "often": 0.0}
    for _ in range(2000):
        shares.enter("often")  # each step is a request of its own
        due = shares.due(["heavy", "often"])
        shares.charge([chunk(project) for project in due], 0.01, ["heavy", "often"])
        for project in due:
            used[project] += 0.01 / len(due)
    assert used["often"] == pytest.approx(used["heavy"], abs=2 * SLACK)


class HeldUp(Runner):
    """An engine's runner whose first step of a project waits for longer than the slack."""

    def __init__(self, runner: Runner, project: str) -> None:
        super().__init__(runner.backend)
        self.project = project
        self.projects: list[set[str]] = []  # of each later step

    def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        projects = {chunk.sequence.request.project for chunk in chunks}
        if not self.projects and self.project in projects:
            time.sleep(1.5 * SLACK)
        if self.projects or self.project in projects:
            self.projects.append(projects)
        return super().run(chunks)


def test_a_project_is_not_charged_for_other_delays_of_its_step(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base)
    engine.runner = runner = HeldUp(engine.runner, "light")
    long, short = (SamplingParams(max_tokens=num, ignore_eos=True) for num in (200, 8))
    engine.add(GenerationRequest("heavy", (1, 2, 3), long, project="heavy"))
    engine.step()
    engine.add(GenerationRequest("light", tuple(range(30)), short, project="light"))
    while not any(output.request_id == "light" and output.finish_reason for output in engine.step()):
        assert engine.has_work
    assert len(runner.projects) >= 8
    assert all("light" in projects for projects in runner.projects)


def test_one_long_step_pauses_no_project_for_long() -> None:
    shares = entered("a", "b")
    shares.charge([chunk("a", 31), chunk("b")], 60.0, ["a", "b"])
    num = 0
    while "a" not in shares.due(["a", "b"]):
        shares.charge([chunk("b")], 0.01, ["a", "b"])
        num += 1
    assert num <= 110  # steps of 10 ms


def test_a_limited_number_of_idle_projects_is_remembered() -> None:
    shares = entered("a")
    for number in range(1000):
        shares.enter(f"p{number}")
        shares.charge([chunk("a"), chunk(f"p{number}")], 0.01, ["a", f"p{number}"])
    assert len(shares._used) <= 2 + 64 + 1


def test_a_short_request_is_hardly_delayed_by_another_projects_full_batch() -> None:
    """Thirty-one long answers: each joint step takes eight times as long as one of the short request alone."""
    alone = timed(num_blocks=4000, max_num_seqs=32)
    (short,) = add(alone, "light", 1, 16)
    seconds_alone = seconds_to_finish(alone, short)
    sim = timed(num_blocks=4000, max_num_seqs=32)
    add(sim, "heavy", 31, 300)
    for _ in range(40):
        sim.step()
    (short,) = add(sim, "light", 1, 16)
    assert seconds_to_finish(sim, short) <= 1.2 * seconds_alone


def test_two_busy_projects_get_equal_time() -> None:
    sim = timed(num_blocks=4000, max_num_seqs=32)
    many, one = add(sim, "many", 24, 400), add(sim, "one", 1, 2000)
    while sim.seconds < 12.0:
        sim.step()
    tokens = one[0].num_output_tokens
    assert tokens * seconds_of(1) == pytest.approx(6.0, rel=0.15), "it had half of the time"
    assert all(s.num_output_tokens > 50 for s in many)


def test_a_stream_that_fills_the_rank_rows_does_not_keep_another_projects_adapters_out() -> None:
    """One stream is enough: its project's last sequence is preempted too, and resumes later."""
    sim = timed(num_blocks=1000, capacity=4)
    (hog,) = add(sim, "hog", 1, 400, *"abcd")
    for _ in range(40):
        sim.step()
    for _ in range(3):
        (victim,) = add(sim, "light", 1, 8, "x")
        assert seconds_to_finish(sim, victim) < 0.2
        for _ in range(10):
            sim.step()
    assert len(sim.displaced) == 3
    sim.drain(sim.bound())
    assert hog in sim.finished


def test_sequences_that_hold_the_same_rows_are_preempted_together() -> None:
    sim = timed(num_blocks=1000, capacity=4)
    hogs = add(sim, "hog", 2, 200, *"abcd")
    for _ in range(60):
        sim.step()
    (victim,) = add(sim, "light", 1, 8, "x")
    assert seconds_to_finish(sim, victim) < 0.2
    assert len(sim.displaced) == 2
    sim.drain(sim.bound())
    assert set(hogs) <= set(sim.finished)


def test_projects_whose_adapters_do_not_fit_together_take_long_turns() -> None:
    """Each needs all rows for a long answer. Preemption at every step would read the adapters again each time."""
    sim = timed(num_blocks=1000, capacity=4)
    first, second = add(sim, "first", 1, 600, *"abcd")[0], add(sim, "second", 1, 600, *"efgh")[0]
    begun = sim.seconds
    while not {first, second} <= set(sim.finished):
        sim.step()
        assert sim.seconds - begun < 60
        if not sim.finished and sim.seconds - begun > 3 * SLACK:
            behind = abs(first.num_output_tokens - second.num_output_tokens) * seconds_of(1)
            assert behind <= 3 * SLACK
    seconds = 1200 * seconds_of(1)
    assert len(sim.displaced) <= seconds / (2 * SLACK) + 1


def test_a_project_keeps_at_most_three_quarters_of_the_rows_while_another_waits_for_some() -> None:
    """The other one has something running, and needs a quarter."""
    sim = timed(num_blocks=1000, capacity=8)
    add(sim, "light", 1, 400)  # of the base
    for digest in "abcdefgh":
        add(sim, "hog", 1, 400, digest)
    sim.limits = sim.scheduler.limits = type(sim.limits)(16, 8, 64, 3)
    for _ in range(30):
        sim.step()
    adapters = {s.request.adapters for s in sim.scheduler.running if s.request.project == "hog"}
    assert len(adapters) == 8
    (first,) = add(sim, "light", 1, 400, "x")
    (second,) = add(sim, "light", 1, 400, "y")
    for _ in range(12):
        sim.step()
    assert first in sim.scheduler.running
    assert second in sim.scheduler.running
    assert len(sim.displaced) == 2


def test_a_short_prompt_does_not_wait_for_a_long_one_of_another_project() -> None:
    sim = timed(num_blocks=4000, max_num_seqs=8, chunk_size=8, max_prefill_tokens=64, drafts=True)
    (long,) = add(sim, "a", 1, 4, length=8000)
    for _ in range(10):
        sim.step()
    (short,) = add(sim, "b", 1, 4, length=20)
    num_steps = sim.num_steps
    seconds_to_finish(sim, short)
    assert sim.num_steps - num_steps <= 6
    assert long in sim.live()


def test_a_project_that_begins_does_not_wait_for_shorter_prompts_of_another() -> None:
    sim = timed(num_blocks=4000, max_num_seqs=32, chunk_size=16, max_prefill_tokens=64)
    add(sim, "heavy", 20, 300, length=40)
    sim.step()
    (begun,) = add(sim, "light", 1, 4, length=48)
    (other,) = add(sim, "heavy", 1, 4, length=48)
    sim.step()
    assert begun.status is Status.RUNNING
    assert other.status is Status.WAITING, "it has to wait for shorter prompts of its project"


def test_short_prompts_of_one_project_do_not_hold_up_a_longer_one_of_another() -> None:
    """More and more of them arrive, and all are shorter than the other project's remaining prompt."""
    sim = timed(num_blocks=4000, max_num_seqs=32, max_prefill_tokens=16, drafts=True)
    add(sim, "a", 1, 3, length=2000)
    sim.step()
    (longer,) = add(sim, "b", 1, 1, length=64)
    num_steps = 0
    while longer not in sim.finished:
        add(sim, "a", 2, 1, length=8)
        sim.step()
        num_steps += 1
    assert num_steps <= 64 / 8 + 1


def test_steps_are_short_while_several_projects_send_requests() -> None:
    """A minute after another project's last request, steps are long again."""
    sim = timed(num_blocks=4000, max_num_seqs=32, max_prefill_tokens=512, drafts=True)
    add(sim, "a", 1, 3, length=20_000)

    def num_tokens() -> int:
        return sum(chunk.num_tokens for chunk in sim.step().chunks)

    assert [num_tokens() for _ in range(10)] == [512] * 10
    (short,) = add(sim, "b", 1, 2)
    seconds_to_finish(sim, short)
    assert seconds_of(max(num_tokens() for _ in range(10))) < 1.2 * QUICK_STEP
    sim.num_steps += 60  # the scheduler's clock
    add(sim, "a", 1, 1)
    assert num_tokens() == 512


def test_equal_projects_run_in_the_same_steps() -> None:
    """Shares cost no throughput among projects with equal use."""
    sim = timed(num_blocks=4000, max_num_seqs=32)
    for number in range(16):
        add(sim, f"p{number}", 2, 100)
    for _ in range(20):
        sim.step()
    widths = [len(sim.step().chunks) for _ in range(60)]
    assert min(widths) == 32


@pytest.mark.parametrize("seed", range(6))
def test_all_requests_end_under_random_traffic_with_shares(seed: int) -> None:
    rng = random.Random(seed)
    sim, gate = simulation(
        seed=seed,
        num_blocks=rng.randint(12, 40),
        capacity=rng.randint(2, 5),
        max_load_steps=3,
        max_num_seqs=rng.choice((1, 2, 4, 8)),
        max_bypass=rng.choice((0, 2, 5)),
        drafts=seed % 2 == 1,
    )
    sim.step_seconds = lambda num: 0.02 + 0.01 * num
    for _ in range(400):
        if rng.random() < 0.3 and len(sim.live()) < 20:
            digests = tuple(rng.choice("abcdefgh") for _ in range(rng.choice((0, 1, 1, 2))))
            sim.add(
                unlike(rng.randrange(10**6), rng.randint(1, 40)),
                rng.randint(1, 30),
                digests,
                project=rng.choice("wxyz"),
            )
        sim.step()
    sim.drain(4 * sim.bound())
    assert not +gate.holds
