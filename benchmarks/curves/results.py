"""What the curves came to, as plain values: what the report is made from and the JSON holds."""

from dataclasses import dataclass

from benchmarks.command import Made
from benchmarks.machine import Machine
from benchmarks.measure import Figures


@dataclass(frozen=True)
class Point:
    """Figures and adapters read have an entry for each round."""

    series: str
    x: int  # 0: the base, where what grows is of adapters
    figures: tuple[Figures, ...]
    adapters_read: tuple[int, ...]  # into memory, while the requests ran
    memory: int  # bytes resident after the requests, of a server that had no others

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
