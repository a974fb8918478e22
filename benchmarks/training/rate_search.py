"""Chooses a learning rate by a grid that grows until its best lies inside: an optimum on the edge is none."""

import math
from collections.abc import Callable

FACTOR = 2.0
"""Between neighbours."""
MOST = 12
"""Rates that are tried before it is given up."""


def best_rate(
    centre: float, loss_at: Callable[[float], float], factor: float = FACTOR, most: int = MOST
) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss, which has a worse neighbour on both sides, and every loss by its rate.

    It starts with `centre` and its two neighbours. A loss that is no number is a run that diverged: the worst.
    Raises RuntimeError after `most` rates.
    """
    steps = {step: _loss(loss_at, centre, factor, step) for step in (-1, 0, 1)}
    while (edge := _edge(steps)) is not None:
        if len(steps) >= most:
            raise RuntimeError(f"no best learning rate from {_span(centre, factor, steps)}")
        steps[edge] = _loss(loss_at, centre, factor, edge)
    losses = {centre * factor**step: steps[step] for step in sorted(steps)}
    return centre * factor ** min(steps, key=lambda step: steps[step]), losses


def _edge(steps: dict[int, float]) -> int | None:
    """What to try next, where the best so far lies on an edge; downwards first where all diverged."""
    best = min(sorted(steps), key=lambda step: steps[step])
    if best == min(steps):
        return best - 1
    return best + 1 if best == max(steps) else None


def _loss(loss_at: Callable[[float], float], centre: float, factor: float, step: int) -> float:
    found = loss_at(centre * factor**step)
    return found if math.isfinite(found) else math.inf


def _span(centre: float, factor: float, steps: dict[int, float]) -> str:
    return f"{centre * factor ** min(steps):.3g} to {centre * factor ** max(steps):.3g}"
