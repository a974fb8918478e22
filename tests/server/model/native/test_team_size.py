"""The number of threads of a step, chosen by how long steps took, against a model of a machine."""

import random
from dataclasses import dataclass, field

import pytest

from server.model.native.team_size import TeamSize, team_sizes

TOKENS, POSITIONS = 8, 1000


@dataclass
class Machine:
    """Steps take 10 ms on one processor. Threads share them evenly, up to the number of free processors.

    With more threads than that, phases wait for time slices of another process. Each step varies by a tenth. One
    in fifty takes three times as long.
    """

    free: int
    noise: random.Random = field(default_factory=lambda: random.Random(7))

    def mean(self, threads: int) -> float:
        shared = 0.01 / min(threads, self.free)
        return shared * (1 + 0.7 * max(threads - self.free, 0))

    def seconds(self, threads: int) -> float:
        spike = 3 if self.noise.random() < 0.02 else 1
        return self.mean(threads) * self.noise.uniform(0.9, 1.1) * spike


def steps(team: TeamSize, machine: Machine, count: int, tokens: int = TOKENS) -> list[int]:
    """Take steps; return the number of threads of each."""
    chosen = []
    for _ in range(count):
        threads = team.choose(tokens)
        seconds = machine.seconds(threads)
        team.observe(threads, tokens, POSITIONS, seconds, seconds * min(threads, machine.free))
        chosen.append(threads)
    return chosen


def cost(machine: Machine, chosen: list[int]) -> float:
    """Return the mean time of the steps, without noise."""
    return sum(map(machine.mean, chosen)) / len(chosen)


def usual(chosen: list[int]) -> int:
    return max(set(chosen), key=chosen.count)


@pytest.mark.parametrize("threads", [2, 8])
def test_the_first_prompts_of_a_server_are_hardly_slowed_by_trials(threads: int) -> None:
    machine = Machine(free=threads)
    chosen = steps(TeamSize(threads), machine, 20, tokens=256)
    assert cost(machine, chosen) < 1.1 * machine.mean(threads)


@pytest.mark.parametrize("threads", [2, 8])
def test_prompts_find_the_only_free_processor(threads: int) -> None:
    assert usual(steps(TeamSize(threads), Machine(free=1), 200, tokens=256)[100:]) == 1


@pytest.mark.parametrize("threads", [2, 4, 8, 32])
def test_trials_take_less_than_2_percent_of_a_quiet_machine(threads: int) -> None:
    machine = Machine(free=threads)
    chosen = steps(TeamSize(threads), machine, 5000)
    assert usual(chosen) == threads
    assert cost(machine, chosen) < 1.02 * machine.mean(threads)


@pytest.mark.parametrize(("threads", "free"), [(2, 1), (4, 2), (8, 4), (8, 2), (8, 1), (32, 2)])
def test_threads_become_as_few_as_the_free_processors(threads: int, free: int) -> None:
    team, quiet, busy = TeamSize(threads), Machine(free=threads), Machine(free=free)
    steps(team, quiet, 1000)
    steps(team, busy, 300)
    chosen = steps(team, busy, 1000)
    assert usual(chosen) == free
    assert cost(busy, chosen) < 1.05 * busy.mean(free)


@pytest.mark.parametrize("threads", [2, 4, 8, 16])
def test_with_half_of_the_processors_busy_steps_take_at_most_1_3_times_the_best(threads: int) -> None:
    """Including those until it is found out, from the first step on."""
    machine = Machine(free=threads // 2)
    chosen = steps(TeamSize(threads), machine, 1000)
    assert cost(machine, chosen) < 1.3 * machine.mean(threads // 2)


@pytest.mark.parametrize(("threads", "free"), [(2, 1), (8, 2), (8, 1), (16, 8)])
def test_all_threads_come_back_once_the_machine_is_quiet(threads: int, free: int) -> None:
    team, quiet, busy = TeamSize(threads), Machine(free=threads), Machine(free=free)
    steps(team, busy, 1000)
    steps(team, quiet, 1000)
    assert usual(steps(team, quiet, 500)) == threads


def test_few_free_processors_are_found_even_if_all_larger_teams_are_as_slow() -> None:
    """Measured on two processors with one busy: 3, 4, 6 and 8 threads took some 330 ms, one took 7."""

    class Crowded(Machine):
        def mean(self, threads: int) -> float:
            return {1: 0.007, 2: 0.011}.get(threads, 0.33)

    chosen = steps(TeamSize(8), Crowded(free=1), 100)
    assert usual(chosen) == 1
    assert max(chosen[40:]) < 8


def test_a_thread_that_gains_nothing_is_left_out() -> None:
    """Steps bound by memory take as long with 6 threads as with 8."""

    class Memory(Machine):
        def mean(self, threads: int) -> float:
            return 0.01 / min(threads, 6)

    assert usual(steps(TeamSize(8), Memory(free=8), 6000)[3000:]) == 6


def test_sizes_of_steps_are_judged_by_themselves() -> None:
    """Waiting costs short steps more than long ones, which all threads share."""
    team, short, long = TeamSize(2), Machine(free=1), Machine(free=2)
    for _ in range(200):
        steps(team, short, 2, tokens=1)
        steps(team, long, 2, tokens=512)
    assert usual(steps(team, short, 100, tokens=1)) == 1
    assert usual(steps(team, long, 100, tokens=512)) == 2


@pytest.mark.parametrize(
    ("threads", "expected"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (8, [1, 2, 3, 4, 6, 8]), (20, [1, 2, 3, 4, 6, 8, 12, 16, 20])],
)
def test_sizes_that_are_tried(threads: int, expected: list[int]) -> None:
    assert team_sizes(threads) == expected


def test_one_thread_is_one_thread() -> None:
    assert set(steps(TeamSize(1), Machine(free=1), 100)) == {1}
