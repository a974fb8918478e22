"""The serving benchmark's results for people: tables in Markdown, and a chart."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.command import QUICK
from benchmarks.measure import Figures, median_ratio
from benchmarks.serving.many_adapters import summary
from benchmarks.serving.results import Cold, LongPrompts, Results, Row
from benchmarks.serving.systems.systems import BASE, OURS, Facts
from benchmarks.serving.targets import evaluate
from benchmarks.tables import gigabytes, milliseconds, number, rounds, spread, table, with_range
from benchmarks.targets import target_table

CANNOT, NOT_ASKED = "can't", "–"
HEADLINES = ("1-base", "1-one", "1-blends", "32-base", "32-one", "32-distinct", "32-blends")
LEAST_SAME = 0.4
"""Of the answers to a load: that so few begin alike is no matter of near ties."""


def markdown(results: Results) -> str:
    """Tables of loads and of targets, and lines on what no table holds."""
    settings = results.settings
    work = (
        f"{settings.model} in {settings.dtype}; distinct prompts of {settings.prompt_tokens} tokens, "
        f"{settings.max_tokens} new tokens, greedy, streamed over HTTP by a client on the same cores or, where "
        "that is said, in process; adapters r=16 on all seven linear modules; "
        f"{rounds(settings.rounds)}, all systems in turn"
    )
    parts = [f"`{results.made.command}`, {results.made.day}. {results.machine}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    if results.systems:
        parts.append(_system_lines(results))
    if results.rows:
        parts += ["Output tokens per second, all streams together:", speed_table(results)]
        parts += ["Our own latency, and what adapters cost:", _own_table(results)]
        parts += ["Between tokens, p50 in ms:", _by_system(results, lambda figures: figures.itl_p50)]
        parts += ["To the first token, p50 in ms:", _by_system(results, lambda figures: figures.ttft_p50)]
    parts += ["What is wanted, and what it reaches:", target_table(evaluate(results))]
    if lines := list(_notes(results)):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def speed_table(results: Results, rows: Sequence[Row] | None = None) -> str:
    """Tokens per second by load and system."""
    return _by_system(results, lambda figures: figures.tokens_per_second, number, rows)


def headlines(results: Results) -> list[Row]:
    """The loads with one stream, and with the most."""
    return [row for row in results.rows if row.load.key in HEADLINES]


def chart(results: Results, path: Path) -> None:
    """Output tokens per second of the headline loads by system, medians with their ranges, as a PNG."""
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


def _system_lines(results: Results) -> str:
    lines = []
    for facts in results.systems:
        memory = results.peak_rss.get(facts.name)
        where = "over HTTP" if facts.over_http else "in process, without HTTP"
        line = f"- **{facts.name}**: {facts.version}; {where}; {facts.settings}"
        if facts.trial:
            tried = "; ".join(f"{way}: {_speeds(speeds)}" for way, speeds in facts.trial.items())
            line += f" (tried before, 1 and most streams in tokens/s: {tried})"
        lines.append(line + (f"; peak RSS {gigabytes(memory)}." if memory else "."))
    lines += [f"- {name} was left out: {why}." for name, why in results.missing.items()]
    return "\n".join(lines)


def _own_table(results: Results) -> str:
    head = ("load", "of own base", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "ITL p99, ms")
    cells = []
    for row in results.rows:
        base = results.row(row.load.streams, BASE)
        of_base = None if base is None or base is row else median_ratio(row.speed(), base.speed())
        figures = row.figures[OURS]
        columns = (
            [one.ttft_p50 for one in figures],
            [one.ttft_p99 for one in figures],
            [one.itl_p50 for one in figures],
            [one.itl_p99 for one in figures],
        )
        cells.append([row.load.title, spread(of_base, ""), *(with_range(each, milliseconds) for each in columns)])
    return table(head, cells)


def _by_system(
    results: Results,
    figure: Callable[[Figures], float],
    form: Callable[[float], str] = milliseconds,
    rows: Sequence[Row] | None = None,
) -> str:
    def cell(row: Row, facts: Facts) -> str:
        figures = row.figures.get(facts.name)
        nothing = NOT_ASKED if facts.is_partial else CANNOT
        return with_range([figure(one) for one in figures], form) if figures else nothing

    cells = [
        [row.load.title, *(cell(row, facts) for facts in results.systems)]
        for row in (results.rows if rows is None else rows)
    ]
    return table(("load", *(facts.name for facts in results.systems)), cells)


def _notes(results: Results) -> Iterator[str]:
    if results.first_token:
        found = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in results.first_token.items())
        yield f"Time to first token of one stream, ms: {found}."
    if results.bandwidth:
        speed = with_range([speed / 1e9 for speed in results.bandwidth], "{:.1f}".format)
        stored, wide = (size / 1e6 for size in (results.settings.weight_bytes, results.settings.wide_bytes))
        in_full = f", and {wide:.0f} MB where they have 16 bits" if stored < wide else ""
        yield f"The threads read {speed} GB/s from memory; a step reads {stored:.0f} MB of weights{in_full}."
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
            f"{with_range(over.offered, number)} requests/s for {over.seconds:g} s, whatever becomes of them: "
            f"{with_range(over.goodput, number)} tokens/s of those not refused, against "
            f"{with_range(over.peak, number)} of {over.streams} streams; "
            f"{with_range(over.refused, '{:.0%}'.format)} were refused, the others had their first token after "
            f"{with_range(over.first_token, '{:.1f}'.format)} s."
        )
    if results.many is not None:
        yield summary(results.many)
    if results.start is not None:
        ready, imports = (
            with_range(each, "{:.1f}".format) for each in (results.start.ready, results.start.imports)
        )
        yield f"Start to ready {ready} s, of which a bare interpreter takes {imports} s to import the same."
    yield from _agreement(results)
    if results.rows:
        cached = sum(row.cached_tokens for row in results.rows)
        yield f"Prompt tokens that our prefix cache knew already: {cached}."
    resent = Counter(results.resent)
    if results.many is not None:
        resent[OURS] += sum(figures.num_resent for figures in (*results.many.base, *results.many.mixed))
    if found := ", ".join(f"{name} {count}" for name, count in resent.items() if count):
        yield f"Requests that were sent again, as the server had dropped their connection: {found}."


def _agreement(results: Results) -> Iterator[str]:
    for facts in results.systems:
        same = [row.same_start[facts.name] for row in results.rows if facts.name in row.same_start]
        if same:
            yield (
                f"Answers of {facts.name} that begin as ours do: {sum(same) / len(same):.0%} "
                f"({min(same):.0%}–{max(same):.0%} by load); in 16 bits the last bits of a sum move near ties"
                + (", **but not so often: it computes something else**." if min(same) < LEAST_SAME else ".")
            )


def _cold_line(cold: Cold) -> str:
    read_packed = _ms(cold.read_packed)
    packed = f", and the packed one that the server reads {read_packed}" if read_packed != "–" else ""
    line = (
        f"A cold adapter, ms: {_ms(cold.uploaded)} on its first request where it was just uploaded, its "
        f"bytes still in the page cache ({_ms(cold.queue)} of it in the queue; reading the file "
        f"{_ms(cold.read_cached)}{packed}); "
        f"{_ms(cold.dropped)} where the cache had been told to drop it (reading the file {_ms(cold.read_disk)})"
    )
    return line + (f"; PEFT's load_adapter {_ms(cold.load_adapter)}." if _ms(cold.load_adapter) != "–" else ".")


def _long_line(long: LongPrompts) -> str:
    return (
        f"{long.streams} running streams while a prompt of {long.prompt_tokens:,} tokens arrives every "
        f"{long.every:g} s, ms: ITL p50 {_ms(long.itl_p50)}, p99 {_ms(long.itl_p99)}; undisturbed p50 "
        f"{_ms(long.quiet_p50)}, p99 {_ms(long.quiet_p99)}; the prompts' first token {_ms(long.first_token)}."
    )


def _ms(seconds: Sequence[float]) -> str:
    return with_range(seconds, milliseconds)


def _speeds(speeds: Sequence[float]) -> str:
    return " and ".join(number(speed) for speed in speeds)
