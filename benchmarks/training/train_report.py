"""Report of the training benchmark: Markdown tables and a chart."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import QUICK, Made
from benchmarks.machine import Machine
from benchmarks.measure import median_ratio, percentile
from benchmarks.tables import number, rounds, table, with_range
from benchmarks.targets import Target, at_least, at_most, target_table, unmeasured
from benchmarks.training.peer import COMPILED, EAGER, PACKED
from benchmarks.training.runs import NATIVE, TORCH, Measured, Side
from benchmarks.training.works import Work

SIDES = (NATIVE, TORCH, EAGER, PACKED, COMPILED)
MEANING = (
    "The peer is transformers (with PEFT for LoRA): {dtype} adapters, the fused AdamW, our allocator's settings. "
    "It pads short rows; *packing* concatenates them; *compiled* is under `torch.compile`, compiling not counted."
)


@dataclass(frozen=True)
class Row:
    """The figures of one work by side, with an entry for each round."""

    work: Work
    figures: dict[Side, tuple[Measured, ...]]

    @property
    def ours(self) -> Side:
        """The side that runs by default."""
        return NATIVE if NATIVE in self.figures else TORCH

    def speed(self, side: Side) -> list[float]:
        return [one.tokens_per_second for one in self.figures.get(side, ())]

    def memory(self, side: Side) -> list[float]:
        return [float(one.peak_rss) for one in self.figures.get(side, ())]


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    model: str
    rounds: int
    rows: list[Row]
    torch_dtype: str = "bf16"  # for sides computed in torch


def evaluate(results: Results) -> list[Target]:
    """Evaluate the target of each work. A quick run reaches and misses none."""
    found = [target for row in results.rows for target in _targets(row)]
    return unmeasured(found) if results.made.quick else found


def markdown(results: Results) -> str:
    """Describe what was run, and list speeds and targets. The chart also shows memory."""
    work = (
        f"{results.model} in bf16; r=16 on all seven linear modules, AdamW; {rounds(results.rounds)}, all sides "
        "in turn, each in a fresh process"
    )
    meaning = MEANING.format(dtype=results.torch_dtype)
    if results.torch_dtype != "bf16":
        meaning += (
            f" The peer, and smolora in torch, compute in {results.torch_dtype}: torch is many times slower in "
            "bf16 on a processor without instructions for it."
        )
    parts = [f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.", f"{work}. {meaning}"]
    if results.made.quick:
        parts.append(QUICK)
    parts += ["Tokens per second, without padding:", speed_table(results)]
    parts += ["Targets:", target_table(evaluate(results))]
    if lines := list(_notes(results)):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def speed_table(results: Results) -> str:
    cells = [[row.work.title, *(with_range(row.speed(side), number) for side in SIDES)] for row in results.rows]
    return table(("work", *SIDES), cells)


def chart(results: Results, path: Path) -> None:
    """Draw tokens per second and peak memory of each side as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colors = ("#2a6f97", "#9db4c0", "#c9ada7", "#81b29a", "#e09f3e")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 0.9 * len(results.rows) + 1.4), layout="constrained")
    height = 0.85 / len(SIDES)
    for axes, title, scale in zip(panels, ("tokens per second", "peak RSS, GB"), (1.0, 1e9), strict=True):
        for place, side in enumerate(SIDES):
            for index, row in enumerate(results.rows):
                values = row.speed(side) if scale == 1.0 else row.memory(side)
                if not values:
                    continue
                y = index - 0.425 + height * (place + 0.5)
                value = percentile(values, 50) / scale
                error = [[value - min(values) / scale], [max(values) / scale - value]]
                axes.barh(y, value, height, color=colors[place])
                axes.errorbar(value, y, xerr=error, color="#333333", linewidth=0.8)
        axes.set_yticks(range(len(results.rows)), [row.work.title for row in results.rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_yticklabels([])
    handles = [Patch(color=color) for color in colors]
    figure.legend(handles, SIDES, loc="outside lower center", ncols=len(SIDES), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _targets(row: Row) -> Iterator[Target]:
    for side, least in row.work.speeds.items():
        ratio = median_ratio(row.speed(row.ours), row.speed(side))
        yield at_least(row.work.title, ratio, least, f"× {side}")
    if row.work.most_memory is not None:
        ratio = median_ratio(row.memory(row.ours), row.memory(COMPILED))
        yield at_most(row.work.title, ratio, row.work.most_memory, f"of the peak RSS of: {COMPILED}")


def _notes(results: Results) -> Iterator[str]:
    """Report how far the sides' first losses differ, and warn about sides that aren't comparable."""
    if not results.rows:
        return
    sides = [[one for figures in row.figures.values() for one in figures] for row in results.rows]
    apart = max(max(one.loss for one in found) / min(one.loss for one in found) - 1 for found in sides)
    yield f"First losses of the sides differ by {apart:.2%} at most."
    for row, found in zip(results.rows, sides, strict=True):
        if not all(one.native for one in row.figures.get(NATIVE, ())):
            yield f"{row.work.title}: **native code wasn't available; smolora computed in torch**."
        if not all(one.keeps_memory for one in found):
            yield f"{row.work.title}: **not all sides had our allocator's settings**."
