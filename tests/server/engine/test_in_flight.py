"""Counts of sequences in flight, against recounts and against the scheduler."""

import timeit
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.engine.admission import InFlight
from server.engine.sequence import Sequence
from tests.kits.properties import num_examples
from tests.server.engine.simulation import Simulation
from tests.server.engine.small import simulation, unlike

PLACES, MAX = 4, 12


class Machine(RuleBasedStateMachine):
    """Requests of several projects arrive, begin and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = InFlight(PLACES, MAX)
        self.requests: list[tuple[str, int, bool]] = []  # project, sequences, whether it has begun

    def own(self, project: str) -> int:
        return sum(num for name, num, _ in self.requests if name == project)

    @rule(project=st.sampled_from("abcde"), num=st.sampled_from([1, 1, 1, 2, 5, 20]))
    def come(self, project: str, num: int) -> None:
        total, own = sum(n for _, n, _ in self.requests), self.own(project)
        share = MAX / len({project, *(name for name, _, _ in self.requests)})
        taken = total == 0 or total + num <= MAX or (own < share and own + num <= MAX and total + num <= 2 * MAX)
        assert self.counts.has_room(project, num) is taken
        if taken:
            self.counts.add(project, num)
            self.requests.append((project, num, False))

    @rule(index=st.integers(0, 99))
    def begin(self, index: int) -> None:
        if self.requests:
            project, num, has_begun = self.requests[index % len(self.requests)]
            if not has_begun:
                self.counts.begin(project, num)
                self.requests[index % len(self.requests)] = project, num, True

    @rule(index=st.integers(0, 99))
    def end(self, index: int) -> None:
        if self.requests:
            project, num, has_begun = self.requests.pop(index % len(self.requests))
            self.counts.end(project, num, num if has_begun else 0)

    @invariant()
    def nothing_is_kept_of_those_that_are_gone(self) -> None:
        assert self.counts.num == sum(num for _, num, _ in self.requests)
        assert set(self.counts._projects) == {project for project, _, _ in self.requests}
        waiting = {project for project, _, has_begun in self.requests if not has_begun}
        assert self.counts._num_projects_waiting == len(waiting)

    @invariant()
    def nobody_is_behind_more_than_all(self) -> None:
        for project in "abcdef":
            assert 0 <= self.counts.num_ahead(project) <= max(self.counts.num + 1 - PLACES, 0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=num_examples(200), stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("project", ["", "p"])
def test_one_project_can_use_the_whole_queue(project: str) -> None:
    counts = InFlight(PLACES, MAX)
    for num in range(MAX):
        assert counts.num_ahead(project) == max(num + 1 - PLACES, 0)
        assert counts.has_room(project, MAX - num)
        assert not num or not counts.has_room(project, MAX - num + 1)
        counts.add(project, 1)
        if num % 3:
            counts.begin(project, 1)
    assert not counts.has_room(project, 1)
    assert counts.num_ahead(project) == MAX + 1 - PLACES


def test_a_project_cannot_keep_others_out_of_the_queue() -> None:
    counts = InFlight(32, 288)
    num_taken: Counter[str] = Counter()
    for attempt in range(100_000):
        if counts.has_room("a", 1):
            counts.add("a", 1)
            num_taken["a"] += 1
        project = f"p{attempt % 5}"
        if attempt >= 50_000 and counts.has_room(project, 1):
            counts.add(project, 1)
            num_taken[project] += 1
    assert num_taken.pop("a") == 288
    assert sorted(num_taken.values()) == [48] * 5, "a sixth each"
    assert counts.num <= 2 * 288


def test_many_projects_may_use_twice_the_queue() -> None:
    counts = InFlight(PLACES, MAX)
    num_taken = 0
    for i in range(1000):
        if counts.has_room(f"p{i}", 1):
            counts.add(f"p{i}", 1)
            num_taken += 1
    assert num_taken == 2 * MAX


def count(sim: Simulation) -> InFlight:
    """Count the simulation's sequences as the event loop would. Sequences with a token have begun."""
    counts = InFlight(sim.limits.max_num_seqs, 10**6)
    for one in sim.live():
        counts.add(one.request.project, 1)
        if one.num_output_tokens:
            counts.begin(one.request.project, 1)
    return counts


def num_ends_before(sim: Simulation, one: Sequence) -> int:
    num_before = len(sim.finished)
    while one not in sim.admissions:
        sim.step()
    return len(sim.finished) - num_before


@pytest.mark.parametrize(
    ("running", "waiting", "project"),
    [
        ({"a": 8}, {"a": 40}, "a"),
        ({"a": 8}, {"a": 40}, "b"),
        ({"a": 8}, {"a": 40, "b": 1}, "b"),
        ({"a": 8}, {"a": 40, "b": 10}, "b"),
        ({"a": 8}, {"a": 40, "b": 10}, "a"),
        ({"a": 8}, {"a": 40, "b": 10, "c": 5, "d": 6}, "c"),
        ({"a": 5, "b": 3}, {"a": 60, "b": 3}, "b"),
        ({"a": 5, "b": 3}, {"a": 3, "b": 60}, "b"),
        (dict.fromkeys("abcdefgh", 1), {"i": 1, "j": 1, "k": 1}, "l"),
        (dict.fromkeys("abcdefgh", 1), {"a": 10}, "b"),
        ({"a": 8}, {"a": 2, "i": 1, "j": 1, "k": 1}, "l"),
    ],
)
def test_the_number_ahead_is_exact(running: dict[str, int], waiting: dict[str, int], project: str) -> None:
    """All answers have one length. The estimate is off by at most a round of turns and a batch."""
    sim, _ = simulation(num_blocks=2000, max_num_seqs=8, max_prefill_tokens=64)
    number = 0

    def add(name: str) -> Sequence:
        nonlocal number
        number += 1
        return sim.add(unlike(number, 4), 20, project=name)[0]

    for name, num in running.items():
        for _ in range(num):
            add(name)
            sim.step()  # so that they don't end together
    for name, num in waiting.items():
        for _ in range(num):
            add(name)
    sim.step()
    expected = count(sim).num_ahead(project)
    found = num_ends_before(sim, add(project))
    assert abs(found - expected) <= 4, (found, expected)


def test_the_cost_of_asking_does_not_depend_on_the_number_in_flight() -> None:
    counts = InFlight(32, 100_000)
    for i in range(50_000):
        counts.add(f"p{i % 5000}", 1)
    seconds = min(timeit.repeat(lambda: (counts.has_room("p7", 1), counts.num_ahead("p7")), number=1000, repeat=5))
    assert seconds / 1000 < 20e-6
