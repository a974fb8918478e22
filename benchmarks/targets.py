"""What is to be reached, each a ratio of figures of one run, and whether it is: the missed ones are shown too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.measure import Spread
from benchmarks.tables import spread, table

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Target:
    """One aim. `reached` is None where it was not measured, or not at the size that it is about."""

    load: str
    wanted: str
    measured: str
    reached: bool | None


def at_least(load: str, ratio: Spread | None, least: float, unit: str) -> Target:
    """Reached where the median over the rounds is `least` or more."""
    reached = None if ratio is None else ratio.median >= least
    return Target(load, f"≥ {least:g} {unit}", spread(ratio, unit), reached)


def at_most(load: str, ratio: Spread | None, most: float, unit: str) -> Target:
    """Reached where the median over the rounds is `most` or less."""
    reached = None if ratio is None else ratio.median <= most
    return Target(load, f"≤ {most:g} {unit}", spread(ratio, unit), reached)


def unmeasured(targets: Sequence[Target]) -> list[Target]:
    """The same of a run too small to reach or miss anything."""
    return [replace(target, reached=None) for target in targets]


def target_table(targets: Sequence[Target]) -> str:
    reached = {True: "yes", False: "**no**", None: NOT_MEASURED}
    cells = [(target.load, target.wanted, target.measured, reached[target.reached]) for target in targets]
    return table(("target", "wanted", "measured", "reached"), cells)
