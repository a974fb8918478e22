"""Report of the usefulness of adapters: a Markdown matrix with standard errors, and a chart."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import QUICK, Made
from benchmarks.machine import Machine
from benchmarks.measure import Figure, standard_error
from benchmarks.tables import table
from benchmarks.training.sentiment import Score

FULL_SET = "movies"
BASE, RULES, BLEND, FULL = "base", "rules", "blend of all four", f"full fine-tuning on {FULL_SET}"


@dataclass(frozen=True)
class SetSize:
    """Numbers of sentences."""

    train: int
    test: int


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    model: str
    how: str  # settings of training
    sizes: dict[str, SetSize]  # by set
    scores: dict[str, dict[str, Score]]  # by adapter or other model, then by set
    seconds: dict[str, Figure]  # of training

    @property
    def order(self) -> list[str]:
        """The order of the matrix's rows."""
        return [BASE, *self.sizes, BLEND, FULL, RULES]


def markdown(results: Results) -> str:
    """Return the matrix and the conclusions."""
    sizes = results.sizes
    work = (
        f"{results.model}; {results.how}; at most {max(size.train for size in sizes.values())} sentences a set. "
        "Accuracy ± one standard error on at most "
        f"{max(size.test for size in sizes.values())} held-out sentences a set; the label is the likelier of two "
        "completions (for the rules: the sign of their score). Bold is the best"
    )
    titles = {name: f"adapter {name}" for name in sizes} | {RULES: "rules (vaderSentiment)"}
    cells = [[titles.get(name, name), *(_cell(results, name, place) for place in sizes)] for name in results.order]
    errors = [_error(results, name, place) for name in results.order for place in sizes]
    lines = [
        *(_line(results, name) for name in sizes),
        f"One standard error is {100 * min(errors):.1f} to {100 * max(errors):.1f} points, and the seed adds to "
        "it: differences below two or three points mean nothing.",
    ]
    parts = [f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.", f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    parts += [
        table(("accuracy", *(f"on {name}" for name in sizes)), cells),
        "\n".join(f"- {line}" for line in lines),
    ]
    return "\n\n".join(parts) + "\n"


def chart(results: Results, path: Path) -> None:
    """Draw accuracy on each set as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    names, order = list(results.sizes), results.order
    accuracy = [[results.scores[name][place].accuracy for place in names] for name in order]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.imshow(accuracy, vmin=0.4, vmax=1.0, cmap="Blues", aspect="auto")
    for row, name in enumerate(order):
        for column, place in enumerate(names):
            value, error = accuracy[row][column], _error(results, name, place)
            color = "white" if value > 0.75 else "black"
            text = f"{value:.3f} ± {error:.3f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(names)), [f"on {name}" for name in names])
    axes.set_yticks(range(len(order)), [f"adapter {name}" if name in names else name for name in order])
    axes.set_title("Accuracy on held-out sentences ± one standard error", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _cell(results: Results, name: str, place: str) -> str:
    found = results.scores[name][place]
    is_best = found.accuracy == max(results.scores[other][place].accuracy for other in results.order)
    text = f"{found.accuracy:.3f} ± {_error(results, name, place):.3f}"
    return f"**{text}**" if is_best else text


def _error(results: Results, name: str, place: str) -> float:
    return standard_error(results.scores[name][place].accuracy, results.sizes[place].test)


def _line(results: Results, name: str) -> str:
    """Compare an adapter on its own set with the base and the rules, given the standard errors."""
    own = results.scores[name][name].accuracy
    verdicts = []
    for other in (BASE, RULES):
        theirs = results.scores[other][name].accuracy
        error = (_error(results, name, name) ** 2 + _error(results, other, name) ** 2) ** 0.5
        verb = "beats" if own > theirs else "**does not beat**"
        near = ", by less than two standard errors" if abs(own - theirs) < 2 * error else ""
        verdicts.append(f"{verb} the {other} ({theirs:.3f}{near})")
    return f"{name}: {own:.3f}, {', '.join(verdicts)}."
