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
    return _target(load, "≥", ratio, least, unit, reached)


def at_most(load: str, ratio: Spread | None, most: float, unit: str) -> Target:
    """Reached where the median over the rounds is `most` or less."""
    reached = None if ratio is None else ratio.median <= most
    return _target(load, "≤", ratio, most, unit, reached)


def _target(load: str, sign: str, ratio: Spread | None, bound: float, unit: str, reached: bool | None) -> Target:
    """With as many digits as show that it is missed, two or more."""
    digits = 2
    while ratio is not None and not reached and digits < 6 and round(ratio.median, digits) == round(bound, digits):
        digits += 1
    return Target(load, f"{sign} {bound:.3g} {unit}", spread(ratio, "", digits), reached)


def unmeasured(targets: Sequence[Target]) -> list[Target]:
    """The same of a run too small to reach or miss anything."""
    return [replace(target, reached=None) for target in targets]


def target_table(targets: Sequence[Target]) -> str:
    """Tabulate the targets, with what misses its target in bold."""
    cells = [
        (target.load, target.wanted, f"**{target.measured}**" if target.reached is False else target.measured)
        for target in targets
    ]
    return table(("target", "wanted", "measured"), cells)
