"""Report of training while serving: Markdown tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.command import QUICK, Made
from benchmarks.machine import Machine
from benchmarks.measure import Figure, Figures, median_ratio
from benchmarks.tables import milliseconds, number, rounds, spread, table, with_range
from benchmarks.targets import Target, at_least, at_most, target_table, unmeasured


@dataclass(frozen=True)
class Round:
    """Seconds and tokens per second of one round."""

    alone: Figures  # the streams, without a job
    with_job: Figures  # the streams, with a job
    job_alone: Figure  # the job's tokens per second, without streams
    job_with_streams: Figure


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    work: str
    rounds: tuple[Round, ...]

    def of_streams(self, figure: Callable[[Figures], float]) -> tuple[list[float], list[float]]:
        """Return a figure of the streams without and with a job."""
        return [figure(one.alone) for one in self.rounds], [figure(one.with_job) for one in self.rounds]

    @property
    def of_job(self) -> tuple[list[float], list[float]]:
        """The job's tokens per second without and with streams."""
        return [one.job_alone for one in self.rounds], [one.job_with_streams for one in self.rounds]


def evaluate(results: Results) -> list[Target]:
    """Evaluate the targets for both at once. A quick run reaches and misses none."""
    alone, with_job = results.of_streams(lambda figures: figures.itl_p99)
    job_alone, job_with_streams = results.of_job
    found = [
        at_least(
            "the job's speed while streams run",
            median_ratio(job_with_streams, job_alone),
            0.22,
            "of its speed alone",
        ),
        at_most("the streams' ITL p99 during the job", median_ratio(with_job, alone), 1.5, "× without it"),
    ]
    return unmeasured(found) if results.made.quick else found


def markdown(results: Results) -> str:
    def row(title: str, both: tuple[Sequence[float], Sequence[float]], form: Callable[[float], str]) -> list[str]:
        alone, together = both
        return [
            title,
            with_range(alone, form),
            with_range(together, form),
            spread(median_ratio(together, alone), "×"),
        ]

    cells = [
        row("ITL p50, ms", results.of_streams(lambda figures: figures.itl_p50), milliseconds),
        row("ITL p99, ms", results.of_streams(lambda figures: figures.itl_p99), milliseconds),
        row("output tokens/s", results.of_streams(lambda figures: figures.tokens_per_second), number),
        row("the job's tokens/s", results.of_job, number),
    ]
    parts = [
        f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.",
        f"{results.work}; {rounds(len(results.rounds))}.",
    ]
    if results.made.quick:
        parts.append(QUICK)
    parts += [table(("figure", "each alone", "both at once", "ratio"), cells), target_table(evaluate(results))]
    return "\n\n".join(parts) + "\n"
