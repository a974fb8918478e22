"""Markdown tables and their cells: a median with its range over the rounds."""

import math
from collections.abc import Callable, Sequence

from benchmarks.measure import Spread, percentile


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(cell or " " for cell in cells) + "|" for cells in lines)


def with_range(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Format the median (lowest–highest), one value alone, or – for no values."""
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return "–"
    median, low, high = (form(value) for value in (percentile(found, 50), min(found), max(found)))
    return median if low == high else f"{median} ({low}–{high})"


def spread(value: Spread | None, unit: str, digits: int = 2) -> str:
    """Format a ratio with its range over the rounds and `digits` decimal places."""
    if value is None:
        return "–"
    median, low, high = (f"{each:.{digits}f}" for each in (value.median, value.low, value.high))
    text = f"{median} {unit}".rstrip()
    return text if low == high else f"{text} ({low}–{high})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    return number(seconds * 1e3)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def rounds(count: int) -> str:
    return f"median (lowest–highest) of {count} rounds" if count > 1 else "one round"
