"""Targets: required ratios of figures of one run, and whether they are reached."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.measure import Spread
from benchmarks.tables import spread, table

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Target:
    """One target. `reached` is None if it wasn't measured, or not at the size it applies to."""

    load: str
    wanted: str
    measured: str
    reached: bool | None


def at_least(load: str, ratio: Spread | None, least: float, unit: str) -> Target:
    """Return a target that is reached if the median over the rounds is at least `least`."""
    reached = None if ratio is None else ratio.median >= least
    return _target(load, "≥", ratio, least, unit, reached)


def at_most(load: str, ratio: Spread | None, most: float, unit: str) -> Target:
    """Return a target that is reached if the median over the rounds is at most `most`."""
    reached = None if ratio is None else ratio.median <= most
    return _target(load, "≤", ratio, most, unit, reached)


def _target(load: str, sign: str, ratio: Spread | None, bound: float, unit: str, reached: bool | None) -> Target:
    """Format the target with two decimal places, or more if a miss wouldn't show otherwise."""
    digits = 2
    while ratio is not None and not reached and digits < 6 and round(ratio.median, digits) == round(bound, digits):
        digits += 1
    return Target(load, f"{sign} {bound:.3g} {unit}", spread(ratio, "", digits), reached)


def unmeasured(targets: Sequence[Target]) -> list[Target]:
    """Return the targets as not measured, for a run too small to reach or miss them."""
    return [replace(target, reached=None) for target in targets]


def target_table(targets: Sequence[Target]) -> str:
    """Tabulate the targets, with missed targets in bold."""
    cells = [
        (target.load, target.wanted, f"**{target.measured}**" if target.reached is False else target.measured)
        for target in targets
    ]
    return table(("target", "wanted", "measured"), cells)
