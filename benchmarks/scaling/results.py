"""Results of the scaling curves as plain values, as stored in JSON and used by the report."""

from dataclasses import dataclass

from benchmarks.command import Made
from benchmarks.machine import Machine
from benchmarks.measure import Figures


@dataclass(frozen=True)
class Point:
    """A point of a curve. `figures` and `adapters_read` have an entry for each round."""

    series: str
    x: int  # 0: the base, on a curve of adapters
    figures: tuple[Figures, ...]
    adapters_read: tuple[int, ...]  # adapters loaded into memory during the requests
    memory: int  # resident bytes after the requests, on a server of its own

    @property
    def speed(self) -> list[float]:
        """Tokens per second of each round."""
        return [figures.tokens_per_second for figures in self.figures]


@dataclass(frozen=True)
class Curve:
    name: str
    title: str
    axis: str
    work: str
    points: tuple[Point, ...]

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(point.series for point in self.points))

    def of(self, series: str) -> list[Point]:
        return [point for point in self.points if point.series == series]


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    model: str
    dtype: str
    rounds: int
    prompt_tokens: int
    max_tokens: int
    curves: tuple[Curve, ...]
