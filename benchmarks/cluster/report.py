"""Report of the cluster's overhead as Markdown, with its target."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cluster.systems import KINDS, SINGLE
from benchmarks.command import QUICK, Made
from benchmarks.machine import Machine
from benchmarks.measure import Figures, median_ratio
from benchmarks.tables import milliseconds, number, rounds, spread, table, with_range
from benchmarks.targets import Target, at_least, target_table, unmeasured

LEAST = 0.8
"""Target for one replica: a share of the single process's tokens per second."""


@dataclass(frozen=True)
class Row:
    """A system with one entry for each round; all systems run the same rounds."""

    name: str
    figures: tuple[Figures, ...]
    processor_ms: tuple[Mapping[str, float], ...]  # per generated token, by kind of process


@dataclass(frozen=True)
class Results:
    """All results of the cluster benchmark."""

    made: Made
    machine: Machine
    work: str
    same: float  # share of the clusters' answers that equal the single process's
    rows: tuple[Row, ...]  # the single process, one replica, several replicas


def targets(results: Results) -> list[Target]:
    """Compare one replica with the single process, round by round."""
    single, one, *_ = results.rows
    ratio = median_ratio(_speeds(one), _speeds(single))
    found = [at_least(f"{one.name}, tokens/s", ratio, LEAST, "× the single process")]
    return unmeasured(found) if results.made.quick else found


def markdown(results: Results) -> str:
    """Return the whole report."""
    single = results.rows[0]
    count = len(single.figures)
    speed_head = ("", "tokens/s", "× single process", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "ITL p99, ms")
    speeds = []
    for row in results.rows:
        ratio = None if row.name == SINGLE else median_ratio(_speeds(row), _speeds(single))
        times = [
            with_range([getattr(found, name) for found in row.figures], milliseconds)
            for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
        ]
        speeds.append((row.name, with_range(_speeds(row), number), spread(ratio, ""), *times))
    where = [
        (row.name, *(with_range([each[kind] for each in row.processor_ms], number) for kind in KINDS))
        for row in results.rows
    ]
    parts = [
        *([QUICK] if results.made.quick else []),
        f"Made by `{results.made.command}`, {results.made.day}. {results.work}. {rounds(count).capitalize()}, of "
        "each system in turn with the same prompts. One machine has it all, the load client too.",
        table(speed_head, speeds),
        "Milliseconds of processors for a generated token, by process. The single process counts as a replica.",
        table(("", *KINDS), where),
        f"{results.same:.0%} of the clusters' answers are those of the single process, letter for letter.",
        target_table(targets(results)),
    ]
    return "\n\n".join(parts)


def _speeds(row: Row) -> list[float]:
    return [found.tokens_per_second for found in row.figures]
