"""Report of the comparison of methods: a Markdown table and a chart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import QUICK, Made
from benchmarks.machine import Machine
from benchmarks.measure import Figure, Interval, percentile, standard_error
from benchmarks.tables import gigabytes, table
from benchmarks.training.methods_run import Outcome


@dataclass(frozen=True)
class Compared:
    """A method at its best learning rate. `rank` is 0 for full fine-tuning."""

    rank: int
    rate: float
    losses: dict[float, Figure]  # on the tuning rows, by learning rate
    outcomes: tuple[Outcome, ...]  # by seed

    @property
    def title(self) -> str:
        return self.outcomes[0].trial.title

    def median(self, figure: Callable[[Outcome], float]) -> float:
        return percentile([figure(one) for one in self.outcomes], 50)

    @property
    def test_loss(self) -> Interval:
        return Interval.of([one.test_loss for one in self.outcomes])

    @property
    def test_accuracy(self) -> Interval:
        return Interval.of([one.test_accuracy for one in self.outcomes])


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    model: str
    data: str
    counts: tuple[int, int, int]  # rows to train on, to choose the learning rate by, and to test on
    compared: list[Compared]  # full fine-tuning first
    in_torch: Outcome  # LoRA computed in torch, like full fine-tuning


def markdown(results: Results) -> str:
    """Describe what was run, compare the methods at their best rates, and say if LoRA doesn't win."""
    num_train, num_tuning, num_test = results.counts
    work = (
        f"{results.model}; {num_train:,} sentences of {results.data}, once, in {num_train // 8} steps of 8 rows; "
        f"AdamW; each method at its best learning rate by the loss on {num_tuning} other sentences; {num_test:,} "
        f"held-out sentences; mean ± half of its 95 % interval over {len(results.compared[0].outcomes)} seeds"
    )
    parts = [f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    parts += [comparison(results), "\n".join(f"- {line}" for line in _notes(results))]
    return "\n\n".join(parts) + "\n"


def comparison(results: Results) -> str:
    """Tabulate the cost and the quality of each method."""
    head = (
        *("method", "trainable parameters", "peak memory", "stored", "time", "tokens/s"),
        *("held-out loss", "held-out accuracy"),
    )
    in_torch = results.in_torch
    cells = [
        *map(_cells, results.compared),
        [
            *(f"{in_torch.trial.title}, in torch", _trainable(in_torch), gigabytes(in_torch.peak_memory)),
            *("–", "–", f"{in_torch.tokens_per_second:.0f}", "–", "–"),
        ],
    ]
    return table(head, cells)


def chart(results: Results, path: Path) -> None:
    """Draw the cost and the quality of each method as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    compared = results.compared
    names = [f"r={one.rank}" if one.rank else "full" for one in compared]
    panels: Sequence[tuple[str, list[float], list[float] | None, str]] = (
        (
            "trainable parameters, millions",
            [one.outcomes[0].num_trainable / 1e6 for one in compared],
            None,
            "{:.1f}",
        ),
        ("peak memory, GB", [one.median(lambda o: o.peak_memory) / 1e9 for one in compared], None, "{:.2f}"),
        ("stored, MB", [one.outcomes[0].bytes_stored / 1e6 for one in compared], None, "{:.0f}"),
        ("tokens per second", [one.median(lambda o: o.tokens_per_second) for one in compared], None, "{:.0f}"),
        ("held-out loss", *_bars([one.test_loss for one in compared]), "{:.3f}"),
        ("held-out accuracy", *_bars([one.test_accuracy for one in compared]), "{:.3f}"),
    )
    colors = ["#2a6f97" if one.rank else "#c9ada7" for one in compared]
    figure, grid = pyplot.subplots(2, 3, figsize=(9, 4.6), layout="constrained")
    for axes, (title, values, error, form) in zip(grid.flat, panels, strict=True):
        bars = axes.bar(names, values, color=colors, yerr=error, ecolor="#333333")
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _cells(one: Compared) -> list[str]:
    return [
        one.title,
        _trainable(one.outcomes[0]),
        gigabytes(one.median(lambda outcome: outcome.peak_memory)),
        f"{one.outcomes[0].bytes_stored / 1e6:.0f} MB",
        f"{one.median(lambda outcome: outcome.seconds):.0f} s",
        f"{one.median(lambda outcome: outcome.tokens_per_second):.0f}",
        one.test_loss.text("{:.4f}"),
        one.test_accuracy.text("{:.3f}"),
    ]


def _trainable(outcome: Outcome) -> str:
    return f"{outcome.num_trainable:,} ({outcome.share:.1%})"


def _bars(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    return [one.mean for one in intervals], [one.half for one in intervals]


def _notes(results: Results) -> Iterator[str]:
    rates = ", ".join(f"{one.title} {one.rate:.3g}" for one in results.compared)
    yield f"Learning rates: {rates}."
    full, *lora = results.compared
    best_loss = min(lora, key=lambda one: one.test_loss.mean)
    best_accuracy = max(lora, key=lambda one: one.test_accuracy.mean)
    yield _verdict("held-out loss", best_loss, best_loss.test_loss, full.test_loss, lower_is_better=True)
    yield _verdict(
        "held-out accuracy", best_accuracy, best_accuracy.test_accuracy, full.test_accuracy, lower_is_better=False
    )
    error = standard_error(full.test_accuracy.mean, results.counts[2])
    yield (
        f"One standard error of {results.counts[2]:,} sentences is {100 * error:.1f} points of accuracy, on top "
        "of the seeds' spread."
    )
    fastest = max(lora, key=lambda one: one.median(lambda outcome: outcome.tokens_per_second))
    speed, of_full = (one.median(lambda outcome: outcome.tokens_per_second) for one in (fastest, full))
    in_torch = results.in_torch.tokens_per_second / of_full
    memory = fastest.median(lambda outcome: outcome.peak_memory) / full.median(lambda outcome: outcome.peak_memory)
    yield (
        f"{fastest.title} (by {fastest.outcomes[0].computed_by}) trains {speed / of_full:.2f} × as many tokens a "
        f"second as full fine-tuning (by {full.outcomes[0].computed_by}), in {memory:.2f} of its memory. "
        f"{results.in_torch.trial.title} by torch: {in_torch:.2f} ×."
    )


def _verdict(what: str, lora: Compared, found: Interval, full: Interval, *, lower_is_better: bool) -> str:
    """State whether the best LoRA is better, worse, or within the error."""
    ahead = found.mean < full.mean if lower_is_better else found.mean > full.mean
    verb = "is better than" if ahead else "is not better than"
    if abs(found.mean - full.mean) <= found.half + full.half:
        verb = "doesn't differ significantly from"
    return f"{what}: the best LoRA ({lora.title}: {found.text('{:.4f}')}) {verb} full ({full.text('{:.4f}')})."
