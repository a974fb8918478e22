"""The curves for people: a table of each in Markdown, and a chart of all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import QUICK
from benchmarks.curves.results import Curve, Point, Results
from benchmarks.measure import Figures, Spread
from benchmarks.tables import gigabytes, milliseconds, number, rounds, spread, table, with_range

COLORS = ("#2a6f97", "#e09f3e", "#81b29a", "#c9ada7")


def markdown(results: Results) -> str:
    """What was run, and a table of each curve."""
    work = (
        f"{results.model} in {results.dtype}, our server alone, over HTTP with the client on the same cores; "
        f"distinct prompts of {results.prompt_tokens} tokens and {results.max_tokens} new ones but where contexts "
        "grow, greedy, without speculation; adapters with random weights on all seven linear modules, resident "
        f"before they are timed as far as they have room; {rounds(results.rounds)}, ratios those of the rounds. "
        "Memory is what the server's process holds after the first round's requests, of a server started for them "
        "alone; it keeps the keys and values of prompts that have ended"
    )
    parts = [f"`{results.made.command}`, {results.made.day}. {results.machine}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    for curve in results.curves:
        parts += [f"### {curve.title}", f"{curve.work[0].upper()}{curve.work[1:]}.", _table(curve)]
    resent = sum(one.num_resent for curve in results.curves for point in curve.points for one in point.figures)
    if resent:
        parts.append(f"{resent} requests were sent again, as the server had dropped their connection.")
    return "\n\n".join(parts) + "\n"


def chart(results: Results, path: Path) -> None:
    """A row of panels for each curve: medians with their ranges, as a PNG."""
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
                if not points[0].x:  # the base, where what grows is of adapters
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
    reads = any(count for point in curve.points for count in point.adapters_read)
    head = (
        *("", curve.axis, "tokens/s", "ratio", "TTFT p50, ms", "ITL p50, ms", "ITL p99, ms", "memory"),
        *(("adapters read",) if reads else ()),
    )
    cells = []
    for point in (point for series in curve.series for point in curve.of(series)):

        def times(figure: Callable[[Figures], float], point: Point = point) -> str:
            return with_range([figure(one) for one in point.figures], milliseconds)

        cells.append(
            [
                *(point.series, f"{point.x:,}" if point.x else "–"),
                *(with_range(point.speed, number), spread(curve.ratio(point), "")),
                times(lambda figures: figures.ttft_p50),
                times(lambda figures: figures.itl_p50),
                times(lambda figures: figures.itl_p99),
                gigabytes(point.memory),
                *([with_range(point.adapters_read, "{:.0f}".format)] if reads else []),
            ]
        )
    return table(head, cells)
