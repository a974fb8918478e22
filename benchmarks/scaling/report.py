"""Report of the scaling curves: a Markdown table for each curve, and one chart."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import QUICK
from benchmarks.measure import Spread
from benchmarks.scaling.results import Curve, Point, Results
from benchmarks.tables import number, rounds, table, with_range

COLORS = ("#2a6f97", "#e09f3e", "#81b29a", "#c9ada7")


def markdown(results: Results) -> str:
    """Describe what was run, and tabulate each curve."""
    work = (
        f"{results.model} in {results.dtype}, smolora alone; prompts of {results.prompt_tokens} tokens, "
        f"{results.max_tokens} new ones, greedy, without speculation; adapters with random weights; "
        f"{rounds(results.rounds)}. The chart has latency and memory, too"
    )
    parts = [f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    for curve in results.curves:
        parts += [f"### {curve.title}", f"{curve.work[0].upper()}{curve.work[1:]}.", _table(curve)]
    resent = sum(one.num_resent for curve in results.curves for point in curve.points for one in point.figures)
    if resent:
        parts.append(f"{resent} requests were sent again, as the server had dropped their connection.")
    return "\n\n".join(parts) + "\n"


def chart(results: Results, path: Path) -> None:
    """Draw a row of panels for each curve, medians with their ranges, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    panels: Sequence[tuple[str, Callable[[Point], list[float]]]] = (
        ("output tokens/s", lambda point: point.speed),
        ("between tokens, p50, ms", lambda point: [figures.itl_p50 * 1e3 for figures in point.figures]),
        ("between tokens, p99, ms", lambda point: [figures.itl_p99 * 1e3 for figures in point.figures]),
        ("first token, p50, ms", lambda point: [figures.ttft_p50 * 1e3 for figures in point.figures]),
        ("memory, GB", lambda point: [point.memory / 1e9]),
    )
    figure, grid = pyplot.subplots(
        len(results.curves),
        len(panels),
        figsize=(13, 2.3 * len(results.curves) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for curve, row in zip(results.curves, grid, strict=True):
        places = sorted({point.x for point in curve.points if point.x})
        for axes, (title, values) in zip(row, panels, strict=True):
            for series, color in zip(curve.series, COLORS, strict=False):
                points = curve.of(series)
                found = [Spread.of(values(point)) for point in points]
                if not points[0].x:  # the base, on a curve of adapters
                    axes.axhline(found[0].median, color=color, linestyle="--", linewidth=1, label=series)
                    continue
                error = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
                medians = [one.median for one in found]
                axes.errorbar(
                    [point.x for point in points],
                    medians,
                    error,
                    color=color,
                    marker="o",
                    markersize=3,
                    label=series,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=8)
            axes.set_xlabel(curve.axis, fontsize=7)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(curve.title, fontsize=9)
        row[0].legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _table(curve: Curve) -> str:
    """Tabulate output tokens per second: a row for each value of the variable, a column for each series."""
    places = sorted({point.x for point in curve.points if point.x})
    found = {(point.series, point.x): with_range(point.speed, number) for point in curve.points}
    alone = [series for series in curve.series if (series, 0) in found]
    columns = [series for series in curve.series if series not in alone]
    cells = [[f"{x:,}", *(found.get((series, x), "–") for series in columns)] for x in places]
    cells += [[f"none, {series}", found[series, 0], *["–"] * (len(columns) - 1)] for series in alone]
    return table((curve.axis, *(f"{series}, tokens/s" for series in columns)), cells)
