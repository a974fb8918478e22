"""Is an adapter worth something: `python -m benchmarks.adapters`.

Four adapters learn to tell positive from negative sentences, each on a set of its own (`benchmarks.ratings`).
Every one is tried on every set's held-out sentences, beside the untouched base, the rule classifier that the
package is, the blend of all four, and full fine-tuning on one set. Writes adapters.json, adapters.md and .png.
"""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import command
from benchmarks.ratings import RatingSet, read_sets, rule_classifier, source_directory
from benchmarks.report import table
from benchmarks.results import Machine
from benchmarks.sentiment import Score, Trained, blend, classify, examples_of, score, train
from server.allocator import keep_freed_memory
from server.model.device import choose_device
from server.model.native.load import find_library
from server.model.smollm import Adapters, NoAdapters, SmolLM
from server.model.source import resolve_base
from server.model.weights import BaseModel, load_base
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from server.training.trainables import TrainableRows
from server.training.trained_rows import TrainedRows

RANK = 16
EPOCHS = 2
LORA_RATE, FULL_RATE = 1e-3, 3e-5
FULL_SET = "movies"
BASE, RULES, BLEND, FULL = "base", "rules", "blend of all four", f"full fine-tuning on {FULL_SET}"


@dataclass(frozen=True)
class Results:
    machine: Machine
    settings: Mapping[str, object]
    sizes: Mapping[str, Mapping[str, int | float]]  # of each set
    scores: Mapping[str, Mapping[str, Score]]  # by what is tried, then by set
    seconds: Mapping[str, float]  # of training


def main(arguments: list[str] | None = None) -> Results:
    """Run it all; the results, which are printed and written too."""
    parser = command.parser("benchmarks.adapters", "Trains an adapter on each of four sets and tries it on all.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the sets are kept")
    parser.add_argument("--train-rows", type=int, default=500, help="of a set, at most")
    parser.add_argument("--test-rows", type=int, default=250, help="of a set, at most")
    options = parser.parse_args(arguments)
    if options.quick:
        options.train_rows, options.test_rows = 16, 12
    say = command.speaker()
    options.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    source = source_directory(options.cache, say)
    sets = read_sets(source, num_train=options.train_rows, num_tuning=0, num_test=options.test_rows)
    base = load_base(resolve_base(options.model, options.home, progress=say), choose_device("cpu", "auto")[1])
    trial = _Trial(base, sets, say, find_library(base, [options.home / "native"], say))
    trial.run(source)
    sizes = {
        rated.name: {
            "train": len(rated.train),
            "test": len(rated.test),
            "positive_test": sum(sentence.is_positive for sentence in rated.test) / len(rated.test),
        }
        for rated in sets
    }
    settings: dict[str, object] = {
        "model": base.name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quick": options.quick,
        "rank": RANK,
        "epochs": EPOCHS,
        "learning_rate": {"lora": LORA_RATE, "full": FULL_RATE},
    }
    results = Results(Machine.this(options.threads), settings, sizes, trial.scores, trial.seconds)
    command.write(options.out, "adapters", asdict(results), markdown(results))
    chart(results, options.out / "adapters.png")
    return results


class _Trial:
    def __init__(
        self, base: BaseModel, sets: Sequence[RatingSet], say: command.Say, library: ctypes.CDLL | None
    ) -> None:
        self._base = base
        self._sets = sets
        self._say = say
        self._library = library
        self.scores: dict[str, dict[str, Score]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, source: Path) -> None:
        """Everything, one after the other."""
        rules = rule_classifier(source)
        self.scores[RULES] = {
            rated.name: score([rules.polarity_scores(s.text)["compound"] >= 0 for s in rated.test], rated.test)
            for rated in self._sets
        }
        frozen = SmolLM(
            self._base.config, self._base.weights, max_positions=self._base.config.max_position_embeddings
        )
        self._try(BASE, frozen, NoAdapters())
        weights = []
        for rated in self._sets:
            trained = self._train(rated.name, rated, "lora")
            assert isinstance(trained.trainable, TrainableRows)
            weights.append(trained.trainable.rows.weights())
            self._try(rated.name, trained.model, trained.adapters)
        mixed = blend(weights, 1 / len(weights))
        shape, dtype, device = self._base.config.shape, self._base.dtype, self._base.device
        self._try(BLEND, frozen, TrainedRows(mixed, shape, dtype, device))
        (rated,) = (rated for rated in self._sets if rated.name == FULL_SET)
        trained = self._train(FULL, rated, "full")
        self._try(FULL, trained.model, trained.adapters)

    def _train(self, name: str, rated: RatingSet, method: str) -> Trained:
        rate = FULL_RATE if method == "full" else LORA_RATE
        spec = JobSpec(
            name,
            method="full" if method == "full" else "lora",
            lora=LoraSpec(rank=RANK, alpha=2 * RANK),
            training=TrainingSpec(epochs=EPOCHS, learning_rate=rate),
        )
        trained = train(self._base, spec, examples_of(self._base, rated.train), self._say, self._library)
        self.seconds[name] = sum(step.seconds for step in trained.steps)
        return trained

    def _try(self, name: str, model: SmolLM, adapters: Adapters) -> None:
        self.scores[name] = {}
        for rated in self._sets:
            self.scores[name][rated.name] = score(classify(self._base, model, adapters, rated.test), rated.test)
        found = ", ".join(f"{place} {one.accuracy:.3f}" for place, one in self.scores[name].items())
        self._say(f"{name}: accuracy on {found}")


def markdown(results: Results) -> str:
    """The matrix and what follows from it."""
    settings, names = results.settings, list(results.sizes)
    work = (
        f"{settings['model']} in {settings['dtype']}; LoRA r={settings['rank']} on all seven linear modules, "
        f"{settings['epochs']} epochs of at most {max(int(size['train']) for size in results.sizes.values())} "
        f"sentences; accuracy / macro-F1 on at most {max(int(size['test']) for size in results.sizes.values())} "
        "held-out sentences a set; the label is the likelier of two completions, for the rules the sign of their "
        "compound score (0 counts as positive)"
    )
    head = ("", *(f"on {name}" for name in names))
    order = [BASE, *names, BLEND, FULL, RULES]
    titles = {name: f"adapter {name}" for name in names} | {RULES: "rules (vaderSentiment)"}
    cells = []
    for name in order:
        best = {place: max(results.scores[n][place].accuracy for n in order) for place in names}
        found = [
            f"{'**' if one.accuracy == best[place] else ''}{one.accuracy:.3f} / {one.macro_f1:.3f}"
            f"{'**' if one.accuracy == best[place] else ''}"
            for place, one in results.scores[name].items()
        ]
        cells.append((titles.get(name, name), *found))
    lines = []
    for name in names:
        own, base, rules = (results.scores[who][name].accuracy for who in (name, BASE, RULES))
        against_base = "beats the base" if own > base else "**does not beat the base**"
        against_rules = "beats the rules" if own > rules else "**does not beat the rules**"
        lines.append(f"- {name}: {own:.3f}, {against_base} ({base:.3f}), {against_rules} ({rules:.3f}).")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in results.seconds.items())
    parts = [f"{results.machine}.", f"{work}."]
    if settings["quick"]:
        parts.append("**A quick run, reduced: not to be compared with anything.**")
    parts += [table(head, cells), "\n".join(lines), f"Training took: {seconds}."]
    return "\n\n".join(parts) + "\n"


def chart(results: Results, path: Path) -> None:
    """Accuracy on each set, as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    names = list(results.sizes)
    order = [BASE, *names, BLEND, FULL, RULES]
    accuracy = [[results.scores[name][place].accuracy for place in names] for name in order]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.imshow(accuracy, vmin=0.4, vmax=1.0, cmap="Blues", aspect="auto")
    for row, values in enumerate(accuracy):
        for column, value in enumerate(values):
            color = "white" if value > 0.75 else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(names)), [f"on {name}" for name in names])
    axes.set_yticks(range(len(order)), [f"adapter {name}" if name in names else name for name in order])
    axes.set_title("Accuracy on held-out sentences", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
