"""What is trained: a search for each method's rate on each task, then tests with fresh seeds.

Every outcome is kept, so an interrupted comparison resumes.
"""

import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks import command
from benchmarks.machine import Machine
from benchmarks.science.trial import Description, Outcome, Place, Trial, describe, run
from benchmarks.training.rate_search import best_rate
from benchmarks.training.tasks import TASKS
from server.training.spec import LEARNING_RATES

RANKS = (8, 16, 32)
SAME_SIZE = (("q·v", 42), ("attention", 21), ("feed-forward", 13))
"""Modules and ranks with about as many parameters as rank 8 on all linear modules."""
SAME_SIZE_TASKS = ("pronunciation", "sentiment")
MORE_RANKS = (1, 4, 64, 256)
MORE_RANKS_TASKS = ("pronunciation", "facts")
DEFAULT_RANK = 16
RATE_SEEDS = (0, 1)
TEST_SEEDS = (10, 11, 12, 13, 14)
FEW_TEST_SEEDS = TEST_SEEDS[:3]
CENTRES = {"lora": LEARNING_RATES["lora"], "full": 5e-5}
"""The first rates of the searches."""
CURVE = (-2, -1, 0, 1, 2)
"""Powers of two of a centre: rates that are measured in any case, with one seed."""
PARTS = ("quality", "parameters", "ranks", "defaults", "costs")


@dataclass(frozen=True)
class Results:
    """All outcomes of one task."""

    task: str
    described: Description
    machines: tuple[Machine, ...]  # that ran parts of them
    hours: float  # of wall time, summed over all runs; two ran at a time
    outcomes: tuple[Outcome, ...]

    def of(self, trial: Trial) -> Outcome | None:
        """Return the trial's outcome, or None if it wasn't run."""
        return next((one for one in self.outcomes if one.trial == trial), None)

    def tests(self, rank: int, targets: str = "all") -> list[Outcome]:
        """Return a method's tests at its best rate, by seed."""
        found = self.best(rank, targets)
        return [] if found is None else self.tests_at(found, rank, targets)

    def tests_at(self, rate: float, rank: int, targets: str = "all") -> list[Outcome]:
        trial = Trial(self.task, rank, rate, 0, targets, is_test=True)
        return [one for seed in TEST_SEEDS if (one := self.of(replace(trial, seed=seed))) is not None]

    def losses(self, rank: int, targets: str = "all") -> dict[float, dict[int, Outcome]]:
        """Return a method's outcomes on the validation rows, by rate and seed."""
        found: dict[float, dict[int, Outcome]] = {}
        for one in sorted(self.outcomes, key=lambda one: one.trial.learning_rate):
            if (one.trial.rank, one.trial.targets, one.trial.is_test) == (rank, targets, False):
                found.setdefault(one.trial.learning_rate, {})[one.trial.seed] = one
        return found

    def best(self, rank: int, targets: str = "all") -> float | None:
        """Return the method's best rate by the mean loss of both seeds, or None before its search has ended."""
        losses = self.losses(rank, targets)
        means = {
            rate: fmean(one.loss for one in by_seed.values())
            for rate, by_seed in losses.items()
            if len(by_seed) == len(RATE_SEEDS)
        }
        finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
        if len(means) < 3 or not finite:
            return None
        best = min(finite, key=lambda rate: finite[rate])
        return best if min(means) < best < max(means) else None


class Store:
    """The outcomes of all tasks, in a file each, and the processes that produce missing ones."""

    def __init__(self, folder: Path, place: Place, machine: Machine, processes: int, say: command.Say) -> None:
        self._folder = folder
        self._place = place
        self._machine = machine
        self._say = say
        self._lock = threading.Lock()
        self._results = {task: kept for task in TASKS if (kept := command.read(folder, task, Results)) is not None}
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self, task: str) -> Results:
        """Return the task's outcomes so far."""
        with self._lock:
            if task not in self._results:
                described = self._pool.submit(describe, task, self._place).result()
                self._results[task] = Results(task, described, (), 0.0, ())
            return self._results[task]

    def outcome(self, trial: Trial) -> Outcome:
        """Return the trial's outcome, from the store if it was run before."""
        if (found := self.results(trial.task).of(trial)) is not None:
            return found
        outcome, seconds = self._pool.submit(run, trial, self._place).result()
        with self._lock:
            kept = self._results[trial.task]
            machines = kept.machines if self._machine in kept.machines else (*kept.machines, self._machine)
            kept = replace(
                kept,
                machines=machines,
                hours=round(kept.hours + seconds / 3600, 4),
                outcomes=tuple(sorted((*kept.outcomes, outcome), key=lambda one: one.trial.key)),
            )
            self._results[trial.task] = kept
            command.write(self._folder, trial.task, kept)
        self._say(f"{trial.key}: loss {outcome.loss:.4f}, right {outcome.share_right:.3f} ({seconds:.0f} s)")
        return outcome

    def repeats(self, key: str) -> bool:
        """Run a kept trial again. Return whether it gives the same figures. Raise SystemExit if there is none."""
        outcomes = [one for kept in self._results.values() for one in kept.outcomes if one.trial.key == key]
        if not outcomes:
            raise SystemExit(
                f"no kept run is named {key!r}: names are like 'sentiment, r=8, 0.001, seed 10, test'"
            )
        again, seconds = self._pool.submit(run, outcomes[0].trial, self._place).result()
        is_same = again == outcomes[0]
        self._say(f"{key}: {'the same figures' if is_same else 'OTHER figures'} ({seconds:.0f} s)")
        return is_same


def carry_out(store: Store, parts: Sequence[str], tasks: Sequence[str], processes: int) -> None:
    """Run what is missing of the parts: task by task, and as many methods at a time as there are processes."""
    for task in tasks:
        with ThreadPoolExecutor(processes) as threads:
            for done in [threads.submit(chain) for chain in _chains(store, parts, task)]:
                done.result()


def _chains(store: Store, parts: Sequence[str], task: str) -> Iterator[Callable[[], None]]:
    """Yield what can run at the same time."""
    if "quality" in parts:
        yield partial(_test, store, untrained(task), (0,))
        for rank in (0, *RANKS):
            yield partial(_tune, store, Trial(task, rank, 0.0, 0), TEST_SEEDS, has_curve=True)
    if "parameters" in parts and task in SAME_SIZE_TASKS:
        for targets, rank in SAME_SIZE:
            yield partial(_tune, store, Trial(task, rank, 0.0, 0, targets), TEST_SEEDS)
    if "ranks" in parts and task in MORE_RANKS_TASKS:
        for rank in MORE_RANKS:
            yield partial(_tune, store, Trial(task, rank, 0.0, 0), TEST_SEEDS)
    if "defaults" in parts:
        yield partial(_test, store, Trial(task, DEFAULT_RANK, LEARNING_RATES["lora"], 0), FEW_TEST_SEEDS)


def untrained(task: str) -> Trial:
    """Return the trial of the base on the test rows."""
    return Trial(task, 1, 0.0, 0, is_test=True)


def _tune(store: Store, trial: Trial, seeds: Sequence[int], *, has_curve: bool = False) -> None:
    """Find the trial's best rate, and test it there."""

    def loss(rate: float, *of_seeds: int) -> float:
        tried = replace(trial, learning_rate=rounded(rate))
        return fmean(store.outcome(replace(tried, seed=seed)).loss for seed in of_seeds)

    centre = CENTRES["lora" if trial.rank else "full"]
    if has_curve:
        for power in CURVE:
            loss(centre * 2.0**power, RATE_SEEDS[0])
        centre, _ = best_rate(centre, lambda rate: loss(rate, RATE_SEEDS[0]))
    rate, _ = best_rate(centre, lambda rate: loss(rate, *RATE_SEEDS), math.sqrt(2))
    _test(store, replace(trial, learning_rate=rounded(rate)), seeds)


def _test(store: Store, trial: Trial, seeds: Sequence[int]) -> None:
    for seed in seeds:
        store.outcome(replace(trial, seed=seed, is_test=True))


def rounded(rate: float) -> float:
    """Round a rate to four digits, so that equal rates have one name."""
    return float(f"{rate:.4g}")
