"""Report of the serving benchmark: Markdown tables and a chart."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import QUICK
from benchmarks.measure import median_ratio
from benchmarks.serving.many_adapters import summary
from benchmarks.serving.results import Cold, LongPrompts, Results, Row
from benchmarks.serving.systems.systems import OURS, Facts
from benchmarks.serving.targets import evaluate
from benchmarks.tables import gigabytes, milliseconds, number, rounds, table, with_range
from benchmarks.targets import target_table

CANNOT, NOT_ASKED = "can't", "–"
HEADLINES = ("1-base", "1-one", "1-blends", "32-base", "32-one", "32-distinct", "32-blends")
LEAST_SAME = 0.4
"""Share of answers that must begin alike: fewer can't be explained by near ties."""


def markdown(results: Results) -> str:
    """Return tables of loads and targets, and the peak memory."""
    settings = results.settings
    work = (
        f"{settings.model} in {settings.dtype}; distinct prompts of {settings.prompt_tokens} tokens, "
        f"{settings.max_tokens} new tokens, greedy, streamed to a client on the same cores; adapters of rank 16 "
        f"on all seven linear modules; {rounds(settings.rounds)}, all systems in turn"
    )
    parts = [f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    if results.rows:
        parts += ["Output tokens per second:", speed_table(results)]
        parts += ["Latency of smolora:", _own_table(results)]
    if results.peak_rss:
        peaks = [f"{name} {gigabytes(peak)}" for name, peak in results.peak_rss.items() if peak]
        parts.append(f"Peak RSS: {', '.join(peaks)}.")
    parts += ["Targets:", target_table(evaluate(results))]
    return "\n\n".join(parts) + "\n"


def details(results: Results) -> str:
    """List the systems with their settings, and what no table holds."""
    return "\n".join(f"- {line}" for line in (*_systems(results), *_notes(results))) + "\n"


def speed_table(results: Results) -> str:
    """Tabulate tokens per second by load and system."""

    def cell(row: Row, facts: Facts) -> str:
        speeds = row.speed(facts.name)
        return with_range(speeds, number) if speeds else NOT_ASKED if facts.is_partial else CANNOT

    cells = [[row.load.title, *(cell(row, facts) for facts in results.systems)] for row in results.rows]
    return table(("load", *(facts.name for facts in results.systems)), cells)


def headlines(results: Results) -> list[Row]:
    """Return the loads with one stream, and with the most."""
    return [row for row in results.rows if row.load.key in HEADLINES]


def chart(results: Results, path: Path) -> None:
    """Draw output tokens per second of the headline loads by system, medians with their ranges, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    systems = [facts for facts in results.systems if facts.max_streams is None]
    rows = headlines(results)
    colors = ("#2a6f97", "#e09f3e", "#f2cc8f", "#f4e3c1", "#81b29a", "#c9ada7", "#9db4c0")
    height = 0.85 / len(systems)
    size = (8, 0.13 * len(rows) * len(systems) + 1.2)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    for place, facts in enumerate(systems):
        name = facts.name
        for index, row in enumerate(rows):
            y = index - 0.425 + height * (place + 0.5)
            speeds = row.speed(name)
            if not speeds:
                if not facts.is_partial:
                    axes.text(0, y, f" {name}: {CANNOT}", va="center", fontsize=6, color="#777777")
                continue
            found = median_ratio(speeds, [1.0] * len(speeds))
            assert found is not None
            error = [[found.median - found.low], [found.high - found.median]]
            label = name if index == 0 else None
            axes.barh(y, found.median, height, color=colors[place % len(colors)], label=label)
            axes.errorbar(found.median, y, xerr=error, color="#333333", linewidth=0.8)
            axes.text(found.high, y, f" {found.median:.0f}", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [row.load.title for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("output tokens per second, all streams together")
    axes.set_title(f"{results.settings.model}, {results.settings.dtype}; {results.machine.processor}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _systems(results: Results) -> Iterator[str]:
    yield f"{results.machine.software}."
    for facts in results.systems:
        where = "over HTTP" if facts.over_http else "in process, without HTTP"
        tried = "; ".join(f"{way}: {_speeds(speeds)}" for way, speeds in facts.trial.items())
        trial = f" (tried before, 1 and most streams in tokens/s: {tried})" if tried else ""
        yield f"**{facts.name}**: {facts.version}; {where}; {facts.settings}{trial}."
    yield from (f"{name} was left out: {why}." for name, why in results.missing.items())


def _own_table(results: Results) -> str:
    cells = []
    for row in results.rows:
        figures = row.figures[OURS]
        columns = (
            [one.ttft_p50 for one in figures],
            [one.itl_p50 for one in figures],
            [one.itl_p99 for one in figures],
        )
        cells.append([row.load.title, *(with_range(each, milliseconds) for each in columns)])
    return table(("load", "TTFT p50, ms", "ITL p50, ms", "ITL p99, ms"), cells)


def _notes(results: Results) -> Iterator[str]:
    if results.first_token:
        found = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in results.first_token.items())
        yield f"Time to first token of one stream, ms: {found}."
    if results.bandwidth:
        speed = with_range([speed / 1e9 for speed in results.bandwidth], "{:.1f}".format)
        stored, wide = (size / 1e6 for size in (results.settings.weight_bytes, results.settings.wide_bytes))
        in_full = f" ({wide:.0f} MB in 16 bits)" if stored < wide else ""
        yield f"Memory is read at {speed} GB/s; a step reads {stored:.0f} MB of weights{in_full}."
    for ways in results.ways:
        greedy, sampled, logprobs = (
            with_range(each, number) for each in (ways.greedy, ways.sampled, ways.logprobs)
        )
        yield (
            f"{ways.streams} stream{'s' if ways.streams > 1 else ''}, tokens/s: greedy {greedy}, "
            f"sampled {sampled}, with logprobs {logprobs}."
        )
    if (cold := results.cold) is not None:
        yield _cold_line(cold)
    if (long := results.long_prompts) is not None:
        yield _long_line(long)
    if (over := results.overload) is not None:
        yield (
            f"Overload, {with_range(over.offered, number)} requests/s for {over.seconds:g} s: "
            f"{with_range(over.goodput, number)} tokens/s, against {with_range(over.peak, number)} of "
            f"{over.streams} streams; {with_range(over.refused, '{:.0%}'.format)} refused; first token after "
            f"{with_range(over.first_token, '{:.1f}'.format)} s."
        )
    if results.many is not None:
        yield summary(results.many)
    if results.start is not None:
        ready, imports = (
            with_range(each, "{:.1f}".format) for each in (results.start.ready, results.start.imports)
        )
        yield f"Start to ready {ready} s, of which imports take {imports} s."
    yield from _agreement(results)
    if cached := sum(row.cached_tokens for row in results.rows):
        yield f"**Prompt tokens found in our prefix cache: {cached}.**"
    resent = Counter(results.resent)
    if results.many is not None:
        resent[OURS] += sum(figures.num_resent for figures in (*results.many.base, *results.many.mixed))
    if found := ", ".join(f"{name} {count}" for name, count in resent.items() if count):
        yield f"Requests that were sent again, as the server had dropped their connection: {found}."


def _agreement(results: Results) -> Iterator[str]:
    found = {}
    for facts in results.systems:
        same = [row.same_start[facts.name] for row in results.rows if facts.name in row.same_start]
        if same:
            wrong = ", **too few: it computes something else**" if min(same) < LEAST_SAME else ""
            found[facts.name] = f"{sum(same) / len(same):.0%}{wrong}"
    if found:
        shares = ", ".join(f"{name} {share}" for name, share in found.items())
        yield f"Answers that begin as ours do (rounding moves near ties): {shares}."


def _cold_line(cold: Cold) -> str:
    peft = f"; PEFT's load_adapter {_ms(cold.load_adapter)}" if _ms(cold.load_adapter) != "–" else ""
    return (
        f"A cold adapter, ms: {_ms(cold.uploaded)} if just uploaded (reading its file {_ms(cold.read_cached)}), "
        f"{_ms(cold.dropped)} if not in the page cache (reading its file {_ms(cold.read_disk)}){peft}."
    )


def _long_line(long: LongPrompts) -> str:
    return (
        f"{long.streams} streams while a prompt of {long.prompt_tokens:,} tokens arrives every {long.every:g} s, "
        f"ms: ITL p50 {_ms(long.itl_p50)}, p99 {_ms(long.itl_p99)}; quiet p50 {_ms(long.quiet_p50)}, p99 "
        f"{_ms(long.quiet_p99)}; the prompts' first token {_ms(long.first_token)}."
    )


def _ms(seconds: Sequence[float]) -> str:
    return with_range(seconds, milliseconds)


def _speeds(speeds: Sequence[float]) -> str:
    return " and ".join(number(speed) for speed in speeds)
