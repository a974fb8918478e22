"""How A's deviation σ and alpha make one learning rate fit all ranks: `python -m benchmarks.ranks`.

Trains adapters of several ranks on three of six tasks by each rule for σ and alpha, and measures the loss on other
rows. For each rank a grid of rates grows around the default rate until the best rate is inside, with several seeds
at each rate. More ranks are trained at the default rate alone. Every run is kept in a file of its own, so an
interrupted comparison resumes. Writes ranks.json, with all kept runs.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from adapters.lora import LoraModule, LoraWeights
from benchmarks import command
from benchmarks.command import QUICK, Made, positive
from benchmarks.machine import Machine
from benchmarks.measure import Figure
from benchmarks.tables import table
from benchmarks.training.rate_search import best_rate
from benchmarks.training.tasks import MAX_LENGTH, TASKS
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device
from server.model.native.load import find_library
from server.model.text.chat import PromptEncoder
from server.system.memory import keep_freed_memory
from server.system.messages import plural
from server.training.encoding import Examples, RowEncoder
from server.training.evaluate import evaluate
from server.training.spec import LEARNING_RATES, LoraSpec, TrainingSpec
from server.training.trainables import trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer, TrainingDiverged

DEFAULT = "default"
RULES: dict[str, tuple[Callable[[int], float], Callable[[int, int], float]]] = {
    DEFAULT: (lambda rank: LoraSpec(rank).alpha, lambda rank, inputs: LoraSpec(rank).init_std),
    "alpha 32, σ 1/r": (lambda rank: 32.0, lambda rank, inputs: 1 / rank),
    "alpha 2r, σ 1/r": (lambda rank: 2.0 * rank, lambda rank, inputs: 1 / rank),
    "alpha 32, σ 1/√in": (lambda rank: 32.0, lambda rank, inputs: 1 / math.sqrt(inputs)),
}
"""Alpha by the rank, and σ by the rank and the module's number of inputs."""
RATE = LEARNING_RATES["lora"]
OTHERS = (2, 8, 32, 128)


@dataclass(frozen=True)
class Trial:
    task: str
    rule: str
    rank: int
    learning_rate: float
    seed: int
    num_rows: int
    num_held_out: int
    epochs: int

    @property
    def title(self) -> str:
        steps = TrainingSpec(epochs=self.epochs).total_steps(self.num_rows)
        return f"{self.task}, {plural(steps, 'step')} on {plural(self.num_rows, 'row')}"

    @property
    def key(self) -> str:
        """The name of its file."""
        rule = list(RULES).index(self.rule)
        rows = f"{self.num_rows}x{self.epochs}-{self.num_held_out}"
        return f"{self.task}-rule{rule}-r{self.rank}-{self.learning_rate:.4g}-seed{self.seed}-{rows}"


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    loss: Figure  # nats per counted held-out token; NaN if the training diverged
    first: Figure  # training loss of the first step: the base's
    peak: Figure  # the highest training loss of any step


@dataclass(frozen=True)
class Results:
    made: Made
    machine: Machine
    model: str
    outcomes: list[Outcome]


def main(arguments: list[str] | None = None) -> Results:
    """Run what wasn't run before. Return the results, which are printed and written too."""
    parser = command.parser("benchmarks.ranks", "Compares rules for alpha and σ by the loss at each rank.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the data is kept")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["sentiment", "words", "pronunciation"])
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--ranks", nargs="*", type=positive, default=[1, 4, 16, 64, 256], help="with all rates")
    parser.add_argument("--others", nargs="*", type=positive, default=OTHERS, help="ranks, with the default rate")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds at each rate")
    parser.add_argument("--rows", type=positive, default=640, help="to train on, in steps of 8")
    parser.add_argument("--held-out", type=positive, default=320, help="rows that are measured")
    parser.add_argument("--epochs", type=positive, default=1)
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks, options.ranks, options.others, options.rows, options.held_out = (
            ["arithmetic"],
            [],
            [2],
            8,
            4,
        )
    say = command.speaker()
    kept = options.out / ("ranks-quick" if options.quick else "ranks")
    kept.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    base = load_base(resolve_base(options.model, options.home, progress=say), choose_device("cpu", "auto")[1])
    bench = _Bench(base, find_library(base, options.home / "native", say), options.cache, kept, say)
    for task in options.tasks:
        trial = Trial(task, DEFAULT, 1, RATE, 0, options.rows, options.held_out, options.epochs)
        for rule in options.rules:
            for rank in options.ranks:
                bench.search(replace(trial, rule=rule, rank=rank), options.seeds)
        for rank in options.others:
            bench.mean_loss(replace(trial, rank=rank), options.seeds)
    results = Results(
        Made.by("benchmarks.ranks", arguments, quick=options.quick),
        Machine.this(options.threads),
        base.name,
        [outcome for file in sorted(kept.glob("*.json")) if (outcome := command.read(kept, file.stem, Outcome))],
    )
    command.write(options.out, "ranks", results)
    print(markdown(results))
    return results


class _Bench:
    """Runs trials, unless their outcomes are kept."""

    def __init__(
        self, base: BaseModel, library: ctypes.CDLL | None, cache: Path, kept: Path, say: command.Say
    ) -> None:
        self._base = base
        self._library = library
        self._cache = cache
        self._kept = kept
        self._say = say
        self._examples: dict[str, Examples] = {}

    def search(self, trial: Trial, seeds: int) -> None:
        """Run the trial at rates around its own."""
        best_rate(trial.learning_rate, lambda rate: self.mean_loss(replace(trial, learning_rate=rate), seeds))

    def mean_loss(self, trial: Trial, seeds: int) -> float:
        """Return the trial's mean loss over seeds 0 to `seeds` - 1, or NaN if one diverged."""
        return fmean(self.run(replace(trial, seed=seed)).loss for seed in range(seeds))

    def run(self, trial: Trial) -> Outcome:
        """Return the trial's outcome, from its file if there is one."""
        outcome = command.read(self._kept, trial.key, Outcome)
        if outcome is None:
            outcome = self._train(trial)
            command.write(self._kept, trial.key, outcome)
            self._say(f"{trial.key}: loss {outcome.loss:.4f}, peak {outcome.peak:.3f}")
        return outcome

    def _train(self, trial: Trial) -> Outcome:
        examples = self._rows(trial)
        alpha, std = RULES[trial.rule]
        lora = LoraSpec(trial.rank)
        start, _ = initial_weights(lora, self._base, trial.seed)
        scaling = alpha(trial.rank) / trial.rank
        modules = {
            key: LoraModule(module.a * (std(trial.rank, module.a.shape[1]) / lora.init_std), module.b, scaling)
            for key, module in start.modules.items()
        }
        trainable = trainable_rows(
            self._base, LoraWeights(modules), None, max_length=MAX_LENGTH, dropout=0.0, library=self._library
        )
        training = TrainingSpec(epochs=trial.epochs, learning_rate=trial.learning_rate, seed=trial.seed)
        trainer = Trainer(trainable, examples[: trial.num_rows], training)
        losses: list[float] = []
        try:
            while trainer.step < trainer.total_steps:
                losses.append(trainer.run_step().loss)
            loss = evaluate(trainable.passes, examples[trial.num_rows :]).loss
        except TrainingDiverged:
            loss = math.nan
        return Outcome(trial, loss, losses[0], max(losses))

    def _rows(self, trial: Trial) -> Examples:
        """Return the rows to train on, then those held out."""
        if trial.task not in self._examples:
            task = TASKS[trial.task](self._cache, self._say)
            rows = [*task.train[: trial.num_rows], *task.validation, *task.test][
                : trial.num_rows + trial.num_held_out
            ]
            ends = self._base.config.eos_token_ids
            encoder = RowEncoder(PromptEncoder(self._base.tokenizer), ends[0], ends)
            self._examples[trial.task] = encoder.encode_all(rows, MAX_LENGTH).examples
        return self._examples[trial.task]


def markdown(results: Results) -> str:
    """Describe the runs, with a table of rates for each rule and a table of the default rate."""
    parts = [
        f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.",
        f"{results.model}; 8 rows a step; held-out loss, mean over seeds. A cell has the loss at the rate "
        f"{RATE:g}, what it is above the best loss of any rate, and that rate. Bold: more than 10 % above, or a "
        "step's loss was twice the base's.",
    ]
    if results.made.quick:
        parts.append(QUICK)
    titles = sorted({one.trial.title for one in results.outcomes})
    for rule in RULES:
        found = [one for one in results.outcomes if one.trial.rule == rule]
        ranks = sorted({one.trial.rank for one in found if one.trial.learning_rate != RATE})
        if ranks:
            rows = [[title, *(_rates(found, title, rank) for rank in ranks)] for title in titles]
            parts.append(f"{rule}:\n\n{table(['rank', *map(str, ranks)], rows)}")
    usual = [one for one in results.outcomes if one.trial.rule == DEFAULT and one.trial.learning_rate == RATE]
    ranks = sorted({one.trial.rank for one in usual if one.trial.seed})
    if ranks:
        rows = [[title, *(_seeds(usual, title, rank) for rank in ranks)] for title in titles]
        of_seeds = table(["rank", *map(str, ranks)], rows)
        parts.append(f"{DEFAULT} at {RATE:g}, mean (lowest–highest) over seeds:\n\n{of_seeds}")
    return "\n\n".join(parts) + "\n"


def _rates(outcomes: Sequence[Outcome], title: str, rank: int) -> str:
    found = [one for one in outcomes if (one.trial.title, one.trial.rank) == (title, rank)]
    usual = [one for one in found if one.trial.learning_rate == RATE]
    if not usual:
        return "–"
    means = {
        rate: fmean(one.loss for one in found if one.trial.learning_rate == rate)
        for rate in {one.trial.learning_rate for one in found}
    }
    best = min((rate for rate, loss in means.items() if math.isfinite(loss)), key=lambda rate: means[rate])
    above = means[RATE] / means[best] - 1
    text = f"{means[RATE]:.3f}, {above:.0%}, {best:g}"
    return text if above <= 0.1 and all(one.peak < 2 * one.first for one in usual) else f"**{text}**"


def _seeds(outcomes: Sequence[Outcome], title: str, rank: int) -> str:
    losses = [one.loss for one in outcomes if (one.trial.title, one.trial.rank) == (title, rank)]
    return f"{fmean(losses):.3f} ({min(losses):.3f}–{max(losses):.3f})" if len(losses) > 1 else "–"


if __name__ == "__main__":
    main()
