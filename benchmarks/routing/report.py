"""Report of the routing simulation: Markdown tables and a chart."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import QUICK, Made
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.simulate import Outcome
from benchmarks.routing.world import BASE_SHARE, NUM_PARTS, PREFIX_SHARE, PREFIX_TOKENS, World
from benchmarks.tables import milliseconds, table

HEAD = (
    *("", "requests that load", "MB loaded a request", "shared text cached", "wait p50, ms", "wait p99, ms"),
    *("queue p99, ms", "longest / mean queue", "homes of the most popular"),
)
LIMITS = Path(__file__).parent / "limits.md"
"""Limits found manually."""
FIGURES: tuple[tuple[str, Callable[[Outcome], float], Callable[[float], str]], ...] = (
    ("requests that load", lambda one: one.cold_share, lambda value: f"{value:.1%}"),
    ("bytes loaded a request", lambda one: one.bytes_loaded, lambda value: f"{value / 1e6:.2f} MB"),
    ("shared text not cached", lambda one: 1 - one.cached_share, lambda value: f"{value:.0%}"),
    ("wait p50", lambda one: one.wait_p50, lambda value: f"{milliseconds(value)} ms"),
    ("wait p99", lambda one: one.wait_p99, lambda value: f"{milliseconds(value)} ms"),
    ("longest / mean queue", lambda one: one.imbalance, lambda value: f"{value:.2f}"),
)
"""Figures for which lower is better."""


@dataclass(frozen=True)
class Results:
    made: Made
    worlds: list[World]
    outcomes: list[Outcome]

    def of(self, world: World) -> list[Outcome]:
        """Return the values in the order of POLICIES."""
        return [outcome for outcome in self.outcomes if outcome.world == world.title]


def markdown(results: Results) -> str:
    world = results.worlds[0]
    parts = [
        "# Which replica a request goes to: a simulation",
        f"Made by `{results.made.command}`, {results.made.day}; all but the last section by the program. "
        "[routing.json](routing.json) has all settings and figures. It is a simulation: no figure here was "
        "measured on a cluster.",
    ]
    if results.made.quick:
        parts.append(QUICK)
    parts += [
        f"{world.num_adapters:,} adapters of rank 8 to 64, {world.num_replicas:,} replicas with room for "
        f"{world.places} of mean size, {world.max_num_seqs} requests in a batch, {world.num_routers} routers that "
        f"hear of the replicas every {world.report_every} s. Poisson arrivals, {world.num_requests:,} requests, "
        f"of which the last {world.num_requests - world.warm_up:,} are counted; {BASE_SHARE:.0%} name the base "
        f"alone, {1 - NUM_PARTS[0]:.0%} of the others two or three adapters; {PREFIX_SHARE:.0%} begin with one of "
        f"the {PREFIX_TOKENS}-token texts that an adapter's users share. A cold load takes "
        f"{milliseconds(world.load_latency)} ms and {world.load_bandwidth / 1e6:.0f} MB/s. {world.failures:g} "
        f"replicas a second fail, for {world.downtime:g} s; their requests are retried. Load is relative to the "
        "throughput of full batches. Wait is from arrival to first token: queue, loading and prefill. All "
        "policies get the same requests, and begin with the same resident adapters.",
        "![Loads and waits by policy](routing.svg)",
    ]
    for world in results.worlds:
        cells = [_cells(outcome) for outcome in results.of(world)]
        parts += [f"## {world.title}", table(HEAD, cells)]
    parts += [
        "## Where `rank` is not the best",
        "\n".join(_losses(results)),
        "## Limits",
        LIMITS.read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(one: Outcome) -> list[str]:
    return [
        *(
            POLICIES[one.policy],
            f"{one.cold_share:.1%}",
            f"{one.bytes_loaded / 1e6:.2f}",
            f"{one.cached_share:.0%}",
        ),
        *(milliseconds(one.wait_p50), milliseconds(one.wait_p99), milliseconds(one.queue_p99)),
        *(f"{one.imbalance:.2f}", str(one.homes)),
    ]


def _losses(results: Results) -> list[str]:
    """Return a line for each figure of each world in which another policy is better than ours."""
    lines = []
    for world in results.worlds:
        ours, *others = results.of(world)
        for title, figure, form in FIGURES:
            better = [
                one for one in others if form(figure(one)) != form(figure(ours)) and figure(one) < figure(ours)
            ]
            if better:
                found = ", ".join(f"{POLICIES[one.policy]} {form(figure(one))}" for one in better)
                lines.append(f"- {world.title}, {title}: {form(figure(ours))}; {found}.")
    return lines or ["Nowhere, by these figures."]


def chart(results: Results, path: Path) -> None:
    """Draw loads, the 99th percentile of waiting, and the imbalance, by world and policy, as an SVG."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "smolora"  # the same results give the same file
    from matplotlib import pyplot

    colors = ("#2a6f97", "#e09f3e", "#f2cc8f", "#81b29a", "#c9ada7", "#9db4c0", "#d9d9d9")
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 0.95 * len(results.worlds) + 1), layout="constrained")
    height = 0.85 / len(POLICIES)
    titles = ("requests that load, %", "wait p99, ms (logarithmic)", "longest / mean queue (logarithmic)")
    for column, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for place, (name, label) in enumerate(POLICIES.items()):
            ones = [one for one in results.outcomes if one.policy == name]
            lengths = [(100 * one.cold_share, 1e3 * one.wait_p99, one.imbalance)[column] for one in ones]
            heights = [index - 0.425 + height * (place + 0.5) for index in range(len(ones))]
            axes.barh(heights, lengths, height, color=colors[place], label=label.replace("`", ""))
        axes.set_title(title, fontsize=9)
        names = [world.title.replace(", ", "\n") for world in results.worlds]
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if column:
            axes.set_xscale("log")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
