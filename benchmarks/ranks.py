"""How A's deviation σ and alpha make one learning rate fit all ranks: `python -m benchmarks.ranks`.

Trains adapters of several ranks on three small tasks by each rule for σ and alpha, and measures the loss on other
rows. For each rank a grid of rates grows around the default rate until the best rate is inside; then other seeds
are trained at the default rate. Every run is kept in a file of its own, so an interrupted comparison resumes.
Writes ranks.json, with all kept runs.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from benchmarks.training.tasks import TASKS
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
SEEDED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_LENGTH = 128


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
        return f"{self.task}, {plural(steps, 'step')}"

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
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--ranks", nargs="*", type=positive, default=[1, 4, 16, 64, 256], help="with all rates")
    parser.add_argument("--seeded", nargs="*", type=positive, default=SEEDED, help="ranks, with three seeds")
    parser.add_argument("--rows", type=positive, default=320, help="to train on, in steps of 8")
    parser.add_argument("--held-out", type=positive, default=160, help="rows that are measured")
    parser.add_argument("--epochs", type=positive, default=3)
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks, options.ranks, options.seeded, options.rows, options.held_out = ["numbers"], [], [2], 8, 4
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
                bench.search(replace(trial, rule=rule, rank=rank))
        for rank in options.seeded:
            for seed in range(3):
                bench.run(replace(trial, rank=rank, seed=seed))
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

    def search(self, trial: Trial) -> None:
        """Run the trial at rates around its own."""
        best_rate(trial.learning_rate, lambda rate: self.run(replace(trial, learning_rate=rate)).loss)

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
            rows = TASKS[trial.task](trial.num_rows + trial.num_held_out, self._cache, self._say)
            ends = self._base.config.eos_token_ids
            encoder = RowEncoder(PromptEncoder(self._base.tokenizer), ends[0], ends)
            self._examples[trial.task] = encoder.encode_all(rows, MAX_LENGTH).examples
        return self._examples[trial.task]


def markdown(results: Results) -> str:
    """Describe the runs, with a table of rates for each rule and a table of seeds."""
    first = results.outcomes[0].trial
    parts = [
        f"`{results.made.program}`, {results.made.day}. {results.machine.hardware}.",
        f"{results.model}; {first.num_rows} rows, 8 a step; loss on {first.num_held_out} other rows. A cell has "
        f"the loss at the rate {RATE:g}, what it is above the best loss of any rate, and that rate. Bold: more "
        "than 10 % above, or a step's loss was twice the base's.",
    ]
    if results.made.quick:
        parts.append(QUICK)
    titles = sorted({one.trial.title for one in results.outcomes})
    for rule in RULES:
        searched = [one for one in results.outcomes if one.trial.rule == rule and one.trial.seed == 0]
        ranks = sorted({one.trial.rank for one in searched if one.trial.learning_rate != RATE})
        if ranks:
            rows = [[title, *(_rates(searched, title, rank) for rank in ranks)] for title in titles]
            parts.append(f"{rule}:\n\n{table(['rank', *map(str, ranks)], rows)}")
    seeds = [one for one in results.outcomes if one.trial.rule == DEFAULT and one.trial.learning_rate == RATE]
    ranks = sorted({one.trial.rank for one in seeds if one.trial.seed})
    if ranks:
        rows = [[title, *(_seeds(seeds, title, rank) for rank in ranks)] for title in titles]
        of_seeds = table(["rank", *map(str, ranks)], rows)
        parts.append(f"{DEFAULT}, mean (lowest–highest) over seeds:\n\n{of_seeds}")
    return "\n\n".join(parts) + "\n"


def _rates(outcomes: Sequence[Outcome], title: str, rank: int) -> str:
    found = [one for one in outcomes if (one.trial.title, one.trial.rank) == (title, rank)]
    if not found:
        return "–"
    (usual,) = (one for one in found if one.trial.learning_rate == RATE)
    if len(found) == 1:
        return f"{usual.loss:.3f}"
    best = min(found, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf)
    above = usual.loss / best.loss - 1
    text = f"{usual.loss:.3f}, {above:.0%}, {best.trial.learning_rate:g}"
    return text if above <= 0.1 and usual.peak < 2 * usual.first else f"**{text}**"


def _seeds(outcomes: Sequence[Outcome], title: str, rank: int) -> str:
    losses = [one.loss for one in outcomes if (one.trial.title, one.trial.rank) == (title, rank)]
    return f"{sum(losses) / len(losses):.3f} ({min(losses):.3f}–{max(losses):.3f})" if len(losses) > 1 else "–"


if __name__ == "__main__":
    main()
