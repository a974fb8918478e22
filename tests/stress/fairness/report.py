"""The arithmetic of `make fairness`: percentiles, the table, and what fails the run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PERIOD = 1.0
"""Seconds between two requests of a kind, however long they take."""
MAX_RATIO = 3.0
"""Highest latency alongside the greedy project, as a multiple of the latency alone."""
PERCENTS = (99, 95, 90)
SHOWN = (50, 95, 99, 100)


HANDOVER = 10.0
"""Seconds in which a job whose slice is over gives way: two looks of its worker, a step, a checkpoint and the
end of a process, all on busy processors."""


@dataclass(frozen=True)
class Sample:
    """One request of the modest project. Seconds count from the moment at which it was due."""

    kind: str
    first_token: float | None
    total: float
    fault: str | None = None  # why it failed


@dataclass(frozen=True)
class JobSample:
    """One training job of the modest project, in seconds. `wait` ends when a worker starts the job."""

    wait: float
    total: float
    status: str


@dataclass
class Phase:
    """What the modest project saw in one phase of the run."""

    samples: list[Sample] = field(default_factory=list)
    jobs: list[JobSample] = field(default_factory=list)

    def of(self, kind: str) -> list[Sample]:
        """Return the samples of a kind of request."""
        return [sample for sample in self.samples if sample.kind == kind]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile: the smallest value that `percent` % of the values don't exceed."""
    return sorted(values)[max(math.ceil(percent * len(values) / 100), 1) - 1]


def judged_percent(num_samples: int) -> int | None:
    """Return the highest of PERCENTS that leaves out at least one sample; None below ten samples.

    p99 of fewer than 100 samples is their maximum, which one pause of the machine decides.
    """
    return next((p for p in PERCENTS if math.ceil(p * num_samples / 100) < num_samples), None)


def latency_faults(
    kind: str, alone: Sequence[Sample], beside: Sequence[Sample], max_ratio: float = MAX_RATIO
) -> tuple[list[str], str]:
    """Return what fails the run for this kind of request, and a line that says what was compared."""
    found = []
    for phase, samples in (("alone", alone), ("with greedy", beside)):
        failures = [sample.fault for sample in samples if sample.fault is not None]
        if failures:
            found.append(
                f"{kind}, {phase}: {len(failures)} of {len(samples)} failed, the first with: {failures[0]}"
            )
    percent = judged_percent(min(len(alone), len(beside)))
    if percent is None:
        return [
            *found,
            f"{kind}: too few samples to judge ({len(alone)} and {len(beside)})",
        ], f"{kind}: not judged"
    before, after = (percentile([s.total for s in samples], percent) for samples in (alone, beside))
    compared = (
        f"{kind}: p{percent} {seconds(before)} alone, {seconds(after)} with greedy, {after / before:.1f} times"
    )
    if after > max_ratio * before:
        found.append(f"{compared}, over {max_ratio:g} times")
    return found, compared


def busy_faults(kind: str, alone: Sequence[Sample]) -> list[str]:
    """Return why the run can't be judged: requests that overlap each other even alone make any ratio small."""
    if alone and (median := percentile([sample.total for sample in alone], 50)) > PERIOD:
        return [
            f"{kind}: the machine is too busy to judge: alone the median is over {PERIOD:g} s, {seconds(median)}"
        ]
    return []


def job_faults(
    alone: Sequence[JobSample], beside: Sequence[JobSample], time_slice: float
) -> tuple[list[str], str]:
    """Return what fails the run for jobs: each must succeed, and wait for a worker for a time slice at most."""
    if not alone or not beside:
        return [f"jobs: too few to judge ({len(alone)} and {len(beside)})"], "jobs: not judged"
    found = [f"a job ended as {job.status}" for job in (*alone, *beside) if job.status != "succeeded"]
    waits = [max(job.wait for job in jobs) for jobs in (alone, beside)]
    totals = [max(job.total for job in jobs) for jobs in (alone, beside)]
    allowed = time_slice + HANDOVER
    compared = (
        f"jobs: waited at most {seconds(waits[0])} alone, {seconds(waits[1])} with greedy, "
        f"allowed {seconds(allowed)}; took at most {seconds(totals[0])} and {seconds(totals[1])} in all"
    )
    if waits[1] > allowed:
        found.append(f"{compared}: too late")
    return found, compared


def table(kinds: Sequence[str], alone: Phase, beside: Phase) -> list[str]:
    """Return the lines of a Markdown table of latencies: first token and total, by kind and phase."""
    heads = [f"{what} p{p}" if p < 100 else f"{what} max" for what in ("first token", "total") for p in SHOWN]
    lines = [_row(["request", "phase", "samples", "failed", *heads]), _row(["---"] * (4 + len(heads)))]
    for kind in kinds:
        rows = [_percentiles(phase.of(kind)) for phase in (alone, beside)]
        for name, phase, row in zip(("alone", "with greedy"), (alone, beside), rows, strict=True):
            found = phase.of(kind)
            num_failed = sum(sample.fault is not None for sample in found)
            lines.append(_row([kind, name, len(found), num_failed, *map(seconds, row)]))
        ratios = [f"{after / before:.1f}" if before else "-" for before, after in zip(*rows, strict=True)]
        lines.append(_row([kind, "ratio", "", "", *ratios]))
    for name, phase in (("alone", alone), ("with greedy", beside)):
        jobs = [f"{job.status}: waited {seconds(job.wait)}, {seconds(job.total)} in all" for job in phase.jobs]
        lines.append(f"jobs {name}: {'; '.join(jobs) or 'none'}")
    return lines


def effect_faults(
    counts: Mapping[str, Mapping[str, int]], wanted: Mapping[str, tuple[frozenset[str], int]]
) -> list[str]:
    """Return the activities of the greedy project that had too little effect for the run to mean anything.

    `wanted`: for each activity the outcomes that count, and how many of them there must be.
    """
    found = []
    for name, (outcomes, least) in wanted.items():
        seen = counts.get(name, {})
        if (num := sum(seen.get(outcome, 0) for outcome in outcomes)) < least:
            found.append(
                f"greedy's {name}: {num} of {'/'.join(sorted(outcomes))}, at least {least} expected: {dict(seen)}"
            )
    return found


def seconds(value: float) -> str:
    """Return a time as text: milliseconds below a second."""
    if math.isinf(value):
        return "never"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _percentiles(samples: Sequence[Sample]) -> list[float]:
    firsts = [math.inf if sample.first_token is None else sample.first_token for sample in samples]
    totals = [sample.total for sample in samples]
    return [percentile(values, p) if values else math.inf for values in (firsts, totals) for p in SHOWN]


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
