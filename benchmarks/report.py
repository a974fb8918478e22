"""The results for people: Markdown on the terminal and for the README, and a chart."""
# ruff: noqa: RUF001

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.many_adapters import summary
from benchmarks.measure import median_ratio, percentile
from benchmarks.results import BASE, BLENDS, LongPrompts, Results, Row
from benchmarks.targets import OF_BASE, TIMES_P50, TIMES_PEER, Target, spread


def markdown(results: Results, targets: Sequence[Target]) -> str:
    """Tables of loads and of targets, and lines on what no table holds."""
    settings = results.settings
    work = (
        f"{settings.model} in {settings.dtype}; distinct prompts of {settings.prompt_tokens} tokens, "
        f"{settings.max_tokens} new tokens, greedy, streamed over HTTP (PEFT: in process); adapters r=16 on all "
        f"seven linear modules; {_rounds(settings.rounds)}, server and peer in turn"
    )
    parts = [f"{results.machine}.", f"{work}."]
    if settings.quick:
        parts.append("**A quick run, reduced: not to be compared with anything.**")
    if results.rows:
        parts.append(_load_table(results))
    parts.append(table(("target", "wanted", "measured", "reached"), [_target_cells(target) for target in targets]))
    lines = _notes(results)
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def chart(results: Results, path: Path) -> None:
    """Output tokens per second of each load, ours and the peer's, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = results.rows
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
    ours_label, peer_label = "smolora, over HTTP", "transformers + PEFT"
    for index, row in enumerate(rows):
        first = index == 0
        ours, peer = percentile(row.our_speed, 50), percentile(row.peer_speed, 50)
        axes.barh(index - 0.2, ours, 0.38, color="#2a6f97", label=ours_label if first else None)
        axes.text(ours, index - 0.2, f" {ours:.0f}", va="center", fontsize=8)
        if not math.isnan(peer):
            axes.barh(index + 0.2, peer, 0.38, color="#c9ada7", label=peer_label if first else None)
            axes.text(peer, index + 0.2, f" {peer:.0f}", va="center", fontsize=8)
        else:
            cannot = row.load.kind == BLENDS and row.load.streams > 1
            why = " PEFT can't" if cannot else " PEFT: not measured"
            axes.text(0, index + 0.2, why, va="center", fontsize=8, color="#777777")
    axes.set_yticks(range(len(rows)), [row.load.title for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second, all streams together")
    axes.set_title(f"{results.settings.model}, {results.settings.dtype}; {results.machine.cpu}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _load_table(results: Results) -> str:
    head = (
        *("load", "smolora, tokens/s", "PEFT, tokens/s", TIMES_PEER, OF_BASE),
        *("TTFT p50 / p99, ms", "ITL p50 / p99, ms", "PEFT: TTFT, ITL p50, ms"),
    )
    return table(head, [_load_cells(results, row) for row in results.rows])


def _load_cells(results: Results, row: Row) -> list[str]:
    base = results.row(row.load.streams, BASE)
    of_base = None if base is None or base is row else median_ratio(row.our_speed, base.our_speed)
    peer = "–"
    if row.peer:
        peer = f"{_ms([f.ttft_p50 for f in row.peer])}, {_ms([f.itl_p50 for f in row.peer])}"
    return [
        row.load.title,
        _speed(row.our_speed),
        _speed(row.peer_speed),
        spread(median_ratio(row.our_speed, row.peer_speed), "×"),
        spread(of_base, "").replace(" ", "") if of_base is not None else "–",
        f"{_ms([f.ttft_p50 for f in row.ours])} / {_ms([f.ttft_p99 for f in row.ours])}",
        f"{_ms([f.itl_p50 for f in row.ours])} / {_ms([f.itl_p99 for f in row.ours])}",
        peer,
    ]


def _target_cells(target: Target) -> list[str]:
    reached = {True: "yes", False: "**no**", None: "–"}[target.reached]
    return [target.load, target.wanted, target.measured, reached]


def _notes(results: Results) -> list[str]:
    lines: list[str] = []
    if (cold := results.cold) is not None:
        line = f"Cold adapter: {_ms(cold.ours)} ms on the first request, {_ms(cold.queue)} ms of it in the queue"
        if cold.load_adapter:
            low = _ms(cold.load_adapter_low_memory)
            line += f"; PEFT's load_adapter {_ms(cold.load_adapter)} ms, with low_cpu_mem_usage {low} ms"
        lines.append(line + f" (medians of {len(cold.ours)}).")
    if (long := results.long_prompts) is not None:
        lines.append(_long_line(long))
    if results.many is not None:
        lines.append(summary(results.many))
    if results.server_peak_rss is not None:
        line = f"Peak RSS: server {results.server_peak_rss / 1e9:.2f} GB"
        if results.peer_peak_rss is not None:
            line += f", peer {results.peer_peak_rss / 1e9:.2f} GB (two copies of the base)"
        lines.append(line + ".")
    same = [f"{row.same_start:.0%} ({row.load.title})" for row in results.rows if row.same_start is not None]
    if same:
        lines.append(f"Answers that begin as the peer's do: {', '.join(same)}.")
    cached = sum(row.cached_tokens for row in results.rows)
    if results.rows:
        lines.append(f"Prompt tokens that the prefix cache knew already: {cached}.")
    return lines


def _long_line(long: LongPrompts) -> str:
    ratio = spread(median_ratio(long.itl_p99, long.itl_p50), TIMES_P50)
    return (
        f"{long.streams} running streams while a prompt of {long.prompt_tokens:,} tokens arrives "
        f"every {long.every:g} s: "
        f"ITL p50 {_ms(long.itl_p50)} ms, p99 {_ms(long.itl_p99)} ms ({ratio}); "
        f"undisturbed p50 {_ms(long.quiet_p50)} ms, p99 {_ms(long.quiet_p99)} ms."
    )


def _speed(values: Sequence[float]) -> str:
    return f"{percentile(values, 50):.1f}" if values else "–"


def _ms(seconds: Sequence[float]) -> str:
    milliseconds = percentile(seconds, 50) * 1e3
    if math.isnan(milliseconds):
        return "–"
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def _rounds(count: int) -> str:
    return f"median of {count} rounds" if count > 1 else "one round"
