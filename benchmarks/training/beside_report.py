"""Training beside serving, for people: tables in Markdown."""

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

    alone: Figures  # the streams, with no job
    beside: Figures  # the streams, with a job
    job_alone: Figure  # the job's tokens per second, with no stream
    job_beside: Figure


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    work: str
    rounds: tuple[Round, ...]

    def of_streams(self, figure: Callable[[Figures], float]) -> tuple[list[float], list[float]]:
        """A figure of the streams, alone and beside the job."""
        return [figure(one.alone) for one in self.rounds], [figure(one.beside) for one in self.rounds]

    @property
    def of_job(self) -> tuple[list[float], list[float]]:
        """Its tokens per second, alone and beside the streams."""
        return [one.job_alone for one in self.rounds], [one.job_beside for one in self.rounds]


def evaluate(results: Results) -> list[Target]:
    """What is wanted of both at once; a quick run reaches nothing and misses nothing."""
    alone, beside = results.of_streams(lambda figures: figures.itl_p99)
    job_alone, job_beside = results.of_job
    found = [
        at_least(
            "the job's speed while streams run", median_ratio(job_beside, job_alone), 0.22, "of its speed alone"
        ),
        at_most("the streams' ITL p99 during the job", median_ratio(beside, alone), 1.5, "× without it"),
    ]
    return unmeasured(found) if results.made.quick else found


def markdown(results: Results) -> str:
    def row(title: str, both: tuple[Sequence[float], Sequence[float]], form: Callable[[float], str]) -> list[str]:
        alone, beside = both
        return [title, with_range(alone, form), with_range(beside, form), spread(median_ratio(beside, alone), "×")]

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
