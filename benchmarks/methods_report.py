"""The comparison of methods for people: a table in Markdown, and a chart."""
# ruff: noqa: RUF001

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods import Outcome, best
from benchmarks.report import table
from benchmarks.results import Machine


def markdown(machine: Machine, work: str, outcomes: Sequence[Outcome], *, quick: bool) -> str:
    """The best run of each method, and what the other learning rates gave."""
    head = (
        *("", "trainable parameters", "peak memory", "stored", "training", "tokens/s", "learning rate"),
        *("held-out loss", "held-out accuracy"),
    )
    cells = [
        (
            found.trial.title,
            f"{found.num_trainable:,} ({found.share:.1%})",
            f"{found.peak_memory / 1e9:.2f} GB",
            f"{found.bytes_stored / 1e6:.0f} MB",
            f"{found.seconds:.0f} s",
            f"{found.tokens_per_second:.0f}",
            f"{found.trial.learning_rate:g}",
            f"{found.test_loss:.4f}",
            f"{found.test_accuracy:.3f}",
        )
        for found in best(outcomes)
    ]
    tried = [
        f"- {found.trial.title}, tuning loss by learning rate: {_by_rate(found, outcomes)}."
        for found in best(outcomes)
    ]
    parts = [f"{machine}.", f"{work}."]
    if quick:
        parts.append("**A quick run, reduced: not to be compared with anything.**")
    parts += [table(head, cells), "\n".join([*tried, *_verdict(outcomes)])]
    return "\n\n".join(parts) + "\n"


def chart(outcomes: Sequence[Outcome], path: Path) -> None:
    """What each method costs and reaches, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    names = ["full" if not found.trial.rank else f"r={found.trial.rank}" for found in outcomes]
    panels = (
        ("trainable parameters, millions", [found.num_trainable / 1e6 for found in outcomes], "{:.1f}"),
        ("peak memory, GB", [found.peak_memory / 1e9 for found in outcomes], "{:.2f}"),
        ("stored, MB", [found.bytes_stored / 1e6 for found in outcomes], "{:.0f}"),
        ("tokens per second", [found.tokens_per_second for found in outcomes], "{:.0f}"),
        ("held-out loss", [found.test_loss for found in outcomes], "{:.3f}"),
        ("held-out accuracy", [found.test_accuracy for found in outcomes], "{:.3f}"),
    )
    colors = ["#c9ada7" if not found.trial.rank else "#2a6f97" for found in outcomes]
    figure, grid = pyplot.subplots(2, 3, figsize=(9, 4.6), layout="constrained")
    for axes, (title, values, form) in zip(grid.flat, panels, strict=True):
        bars = axes.bar(names, values, color=colors)
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _by_rate(found: Outcome, outcomes: Sequence[Outcome]) -> str:
    tried = [outcome for outcome in outcomes if outcome.trial.rank == found.trial.rank]
    return ", ".join(f"{outcome.trial.learning_rate:g}: {outcome.tuning_loss:.4f}" for outcome in tried)


def _verdict(outcomes: Sequence[Outcome]) -> list[str]:
    """Where LoRA doesn't win, said plainly."""
    full, *lora = best(outcomes)
    lines = []
    for what, better, of_full in (
        ("held-out loss", min(lora, key=lambda o: o.test_loss), full.test_loss),
        ("held-out accuracy", max(lora, key=lambda o: o.test_accuracy), full.test_accuracy),
    ):
        value = better.test_loss if what == "held-out loss" else better.test_accuracy
        wins = value < of_full if what == "held-out loss" else value > of_full
        verb = "beats" if wins else "does not beat"
        lines.append(f"- {what}: the best LoRA ({better.trial.title}: {value:.4f}) {verb} full ({of_full:.4f}).")
    fastest = max(lora, key=lambda o: o.tokens_per_second)
    speed, memory = fastest.tokens_per_second / full.tokens_per_second, fastest.peak_memory / full.peak_memory
    lines.append(
        f"- speed: the fastest LoRA ({fastest.trial.title}) trains {speed:.2f} × as many tokens a second as full "
        f"fine-tuning, in {memory:.2f} of its memory."
    )
    return lines
