"""Search for a learning rate on a grid that grows until its best rate is inside: the best on the edge isn't an
optimum."""

import math
from collections.abc import Callable

FACTOR = 2.0
"""Ratio of neighbouring rates."""
MOST = 12
"""Maximum number of rates tried."""


def best_rate(
    centre: float, loss_at: Callable[[float], float], factor: float = FACTOR, most: int = MOST
) -> tuple[float, dict[float, float]]:
    """Return the rate with the lowest loss, which has a worse neighbour on both sides, and every loss by its rate.

    The search starts with `centre` and its two neighbours. A NaN loss is a diverged run and counts as the worst.
    Raise RuntimeError after `most` rates.
    """
    steps = {step: _loss(loss_at, centre, factor, step) for step in (-1, 0, 1)}
    while (edge := _edge(steps)) is not None:
        if len(steps) >= most:
            raise RuntimeError(f"no best learning rate from {_span(centre, factor, steps)}")
        steps[edge] = _loss(loss_at, centre, factor, edge)
    losses = {centre * factor**step: steps[step] for step in sorted(steps)}
    return centre * factor ** min(steps, key=lambda step: steps[step]), losses


def _edge(steps: dict[int, float]) -> int | None:
    """Return the next rate to try if the best so far is on an edge; if all diverged, the next lower one."""
    best = min(sorted(steps), key=lambda step: steps[step])
    if best == min(steps):
        return best - 1
    return best + 1 if best == max(steps) else None


def _loss(loss_at: Callable[[float], float], centre: float, factor: float, step: int) -> float:
    found = loss_at(centre * factor**step)
    return found if math.isfinite(found) else math.inf


def _span(centre: float, factor: float, steps: dict[int, float]) -> str:
    return f"{centre * factor ** min(steps):.3g} to {centre * factor ** max(steps):.3g}"
