"""Projects take turns, and each can have a place, whatever other projects request."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sequence import Sequence, Status
from tests.kits.properties import num_examples
from tests.server.engine.simulation import Simulation
from tests.server.engine.small import prompt, simulation, unlike


def add(sim: Simulation, project: str, num: int, *, max_tokens: int = 4, digest: str = "") -> list[Sequence]:
    """Add requests of a project, whose prompts share no prefix."""
    digests = (digest,) if digest else ()
    return [
        sim.add(unlike(sim.rng.randrange(10**9), 4), max_tokens, digests, project=project)[0] for _ in range(num)
    ]


def order(sim: Simulation) -> str:
    """Return the projects of the sequences admitted so far."""
    return "".join(s.request.project for s in sim.admissions)


@pytest.mark.parametrize("num_places", [1, 2, 4])
def test_ten_thousand_waiting_sequences_do_not_delay_another_project(num_places: int) -> None:
    sim, _ = simulation(max_num_seqs=num_places)
    add(sim, "a", 10_000)
    for _ in range(3):
        sim.step()
    (other,) = add(sim, "b", 1)
    num_before = len(sim.admissions)
    while other in sim.live():
        sim.step()
    num_ahead = sim.admissions.index(other) - num_before
    assert num_ahead <= (1 if num_places == 1 else 0), "a single place isn't taken away: it was the other's turn"
    assert sim.scheduler.num_waiting > 9_900


def test_projects_take_turns() -> None:
    sim, _ = simulation(max_num_seqs=1)
    for project, num in (("a", 6), ("b", 3), ("c", 2)):
        add(sim, project, num)
    sim.drain(200)
    assert order(sim) == "abcabcabaaa"


def test_the_sets_of_a_project_take_turns() -> None:
    """A project with more adapters has no more turns."""
    sim, _ = simulation(max_num_seqs=1, capacity=10)
    for digest in "xyz":
        add(sim, "a", 2, digest=digest)
    add(sim, "b", 4, digest="x")
    for _ in range(3):
        sim.step()  # everything is read meanwhile
    sim.drain(200)
    assert order(sim) in ("ababababaa", "babababaaa")
    of_a = [s.request.adapters[0].digest for s in sim.admissions if s.request.project == "a"]
    assert of_a in (list("xyzxyz"), list("yzxyzx"), list("zxyzxy"))


def test_with_one_project_only_adapter_sets_take_turns() -> None:
    """Some of the sequences were preempted or lacked room."""
    for project in ("", "p"):
        sim, _ = simulation(num_blocks=9, max_num_seqs=3, capacity=2, max_load_steps=2)
        name = {}
        for i, digests in enumerate(["a", "a", "b", "", "ab", "a", "c", "b", "", "a", "c", "a"]):
            (new,) = sim.add(unlike(i, 3 + 5 * (i % 3)), 2 + 6 * (i % 4), tuple(digests), project=project)
            name[new] = "abcdefghijkl"[i]
        sim.drain(500)
        assert "".join(name[s] for s in sim.admissions) == "digakkccebbhfjfjl"
        assert sim.scheduler.num_preemptions == 5


def test_the_youngest_sequence_of_the_largest_project_is_preempted() -> None:
    sim, _ = simulation(max_num_seqs=5)
    few, many = add(sim, "few", 2, max_tokens=50), add(sim, "many", 5, max_tokens=50)
    for _ in range(4):
        sim.step()
    assert order(sim) == "fewmanyfewmanymany"
    (other,) = add(sim, "b", 1, max_tokens=50)
    sim.step()
    assert sim.displaced == [many[2]]
    assert sim.scheduler.running == [few[0], many[0], few[1], many[1], other]
    sim.abort(other)
    sim.step()
    assert sim.scheduler.running[-1] is many[2], "it comes back before those of its project that never ran"
    assert len(sim.displaced) == 1
    sim.drain(sim.bound())


def test_a_step_preempts_one_sequence_and_never_a_projects_last() -> None:
    sim, _ = simulation(max_num_seqs=3)
    add(sim, "a", 6, max_tokens=60)
    for _ in range(3):
        sim.step()
    for project in "bcde":
        add(sim, project, 2, max_tokens=60)
    for num_displaced in (1, 2, 2, 2):
        sim.step()
        assert len(sim.displaced) == num_displaced
    assert [s.request.project for s in sim.scheduler.running] == ["a", "b", "c"]
    sim.abort(sim.scheduler.running[1])
    sim.step()
    assert sim.scheduler.running[-1].request.project == "d", "with nothing running, before others whose turn it is"
    sim.drain(sim.bound())


def test_a_sequence_that_is_preempted_after_its_turn_gets_no_chunk() -> None:
    """The younger takes the last free block, and loses it to the older, which needs one as well."""
    sim, _ = simulation(num_blocks=5, max_num_seqs=2, max_prefill_tokens=64)
    older, younger = (sim.add(unlike(i, 3), 12, project=project)[0] for i, project in enumerate("ab"))
    while older.num_computed_tokens < 8 or younger.num_computed_tokens < 8:
        sim.step()
    assert sim.blocks.num_free_blocks == 1
    chunks = sim.scheduler._chunks({younger: 9, older: 9})
    assert [chunk.sequence for chunk in chunks] == sim.scheduler.running == [older]


def test_no_sequence_is_preempted_for_one_whose_adapter_is_loading() -> None:
    sim, gate = simulation(max_num_seqs=2, max_load_steps=9, seed=1)
    add(sim, "a", 4, max_tokens=60)
    sim.step()
    add(sim, "b", 1, digest="x")
    for _ in range(3):
        sim.step()
        assert gate.loading
        assert not sim.displaced
    while gate.loading:
        sim.step()
    for _ in range(2):
        sim.step()
    assert len(sim.displaced) == 1
    assert order(sim) == "aab"
    sim.drain(sim.bound())


def test_no_sequence_is_preempted_in_vain() -> None:
    """Preempting the youngest wouldn't free enough for the other prompt, so nothing is preempted."""
    sim, _ = simulation(num_blocks=12, max_num_seqs=2)
    add(sim, "a", 2, max_tokens=12)
    sim.step()
    (large,) = sim.add(unlike(1, 40), 2, project="b")
    while len(sim.live()) == 3:
        sim.step()
    assert not sim.displaced
    assert sim.scheduler.num_preemptions == 0
    sim.drain(sim.bound())
    assert large in sim.finished


def test_no_sequence_is_preempted_if_there_is_room() -> None:
    sim, _ = simulation(max_num_seqs=4)
    add(sim, "a", 3, max_tokens=20)
    for _ in range(2):
        sim.step()
    add(sim, "b", 1)
    sim.step()
    assert order(sim) == "aaab"
    assert sim.scheduler.num_preemptions == 0
    sim.drain(sim.bound())


def test_no_sequence_is_preempted_for_one_that_may_not_pass_another() -> None:
    """A large prompt was passed over `max_bypass` times, and preemption wouldn't free enough for it."""
    sim, _ = simulation(num_blocks=24, max_num_seqs=2, max_bypass=0)
    runners = [sim.add(unlike(i, 16), 20, project="a")[0] for i in range(2)]
    for _ in range(4):
        sim.step()
    sim.add(unlike(3, 80), 4, project="large")
    add(sim, "b", 1)
    while all(one in sim.live() for one in runners):
        assert set(sim.scheduler.running) == set(runners)
        sim.step()
    sim.drain(sim.bound())
    assert order(sim) == "aalargeb"


def test_adapters_of_all_projects_are_read_ahead() -> None:
    """All places are taken. One project's many adapters don't delay the reads of another's."""
    sim, gate = simulation(max_num_seqs=2, capacity=20)
    add(sim, "a", 1, max_tokens=60)
    add(sim, "b", 1, max_tokens=60)
    sim.step()
    for digest in "cdefgh":
        add(sim, "a", 1, digest=digest)
    add(sim, "b", 1, digest="x")
    for _ in range(4):
        sim.step()
    assert gate.loaded == ["c", "x"]
    sim.drain(sim.bound())


def test_blocks_are_made_free_for_a_project_with_nothing_running() -> None:
    """Places are free, but one project's answers fill the cache."""
    sim, _ = simulation(num_blocks=16, max_num_seqs=8)
    first, second = (sim.add(unlike(i, 24), 8, project="a")[0] for i in range(2))
    for _ in range(4):
        sim.step()
    assert sim.scheduler.running == [first, second]
    (other,) = sim.add(unlike(3, 12), 6, project="b")
    for _ in range(2):
        sim.step()
    assert sim.displaced == [second]
    assert sim.scheduler.running == [first, other]
    sim.drain(sim.bound())


def test_a_large_prompt_of_a_busy_project_does_not_delay_others() -> None:
    """It was passed over `max_bypass` times, so its project waits, but another project runs."""
    sim, _ = simulation(num_blocks=20, max_num_seqs=8, max_bypass=1)
    sim.add(unlike(0, 16), 40, project="a")
    sim.step()
    (large,) = sim.add(unlike(1, 60), 4, ("x",), project="a")
    waiting = add(sim, "a", 20, max_tokens=2)
    for _ in range(8):
        sim.step()
    assert sim.scheduler._waiting.set_of(large).num_bypassed >= 1
    passed = list(sim.finished)
    (other,) = add(sim, "b", 1, max_tokens=2)
    for _ in range(4):
        sim.step()
    assert sim.finished == [*passed, other]
    assert len(passed) < len(waiting)
    sim.drain(sim.bound())


def test_a_stream_of_other_projects_does_not_starve_a_large_prompt() -> None:
    """Each new project has nothing running, and neither has the project whose prompt needs most blocks."""
    sim, _ = simulation(num_blocks=20, max_num_seqs=4, max_bypass=3)
    large = None
    for step in range(300):
        if step == 20:
            (large,) = sim.add(unlike(1, 70), 4, project="large")
        add(sim, f"p{step % 7}", 1)
        sim.step()
        if large in sim.finished:
            break
    assert large in sim.finished
    sim.drain(sim.bound())


def test_no_project_starves_behind_new_projects() -> None:
    """New projects have nothing running and come first, but a running project still makes progress."""
    sim, _ = simulation(max_num_seqs=2)
    busy = add(sim, "busy", 6, max_tokens=6)
    for step in range(400):
        add(sim, f"p{step}", 1)
        sim.step()
        if not any(s in sim.live() for s in busy):
            break
    assert not any(s in sim.live() for s in busy)


@settings(max_examples=num_examples(150), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(8, 80),
    max_num_seqs=st.integers(2, 5),
    max_load_steps=st.integers(1, 4),
    max_bypass=st.integers(0, 3),
    num_projects=st.integers(2, 12),
    num=st.integers(15, 50),
)
def test_the_number_of_preemptions_is_limited(
    seed: int,
    num_blocks: int,
    max_num_seqs: int,
    max_load_steps: int,
    max_bypass: int,
    num_projects: int,
    num: int,
) -> None:
    """There is at most one preemption per new sequence and per sequence that lost its blocks."""
    rng = random.Random(seed)
    sim, gate = simulation(
        seed=seed,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_load_steps=max_load_steps,
        max_bypass=max_bypass,
    )
    added: list[Sequence] = []
    while len(added) < num:
        digests = rng.sample("abcdef", rng.choice((0, 0, 1, 2)))
        project = str(rng.choice((0, rng.randrange(num_projects))))
        length, max_tokens = rng.randint(1, 30), rng.randint(1, 30)
        added += sim.add(prompt(rng, length), max_tokens, tuple(digests), rng.choice((1, 1, 3)), project)
        for _ in range(rng.choice((0, 0, 1, 5))):
            sim.step()
    sim.drain(sim.bound())
    assert not +gate.holds
    assert set(sim.finished) == set(added)
    assert all(s.num_output_tokens == s.request.sampling.max_tokens for s in added)
    num_for_blocks = sim.scheduler.num_preemptions - len(sim.displaced)
    assert len(sim.displaced) <= len(added) + num_for_blocks


def test_a_sequence_is_not_preempted_again_before_the_other_has_ended() -> None:
    """Each of many projects takes one place and keeps it, however long others wait."""
    sim, _ = simulation(num_blocks=400, max_num_seqs=8)
    add(sim, "a", 8, max_tokens=100)
    for _ in range(2):
        sim.step()
    for project in "bcdefghij":
        add(sim, project, 3, max_tokens=30)
    for _ in range(20):
        sim.step()
    assert len(sim.displaced) == 7
    assert len(set(sim.displaced)) == 7
    assert all(s.status is Status.WAITING for s in sim.displaced)
    sim.drain(sim.bound())
    assert len(sim.displaced) <= 7 + 2 + 27
