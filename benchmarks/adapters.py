"""Measure whether adapters are useful: `python -m benchmarks.adapters`.

Four adapters learn to tell positive from negative sentences, each on its own set (`benchmarks.training.ratings`).
Each adapter is tested on the held-out sentences of every set and compared with the base, the package's rule
classifier, the blend of all four adapters, and full fine-tuning on one set. Writes adapters.json.
"""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import command
from benchmarks.command import Made
from benchmarks.machine import Machine
from benchmarks.training.adapters_report import BASE, BLEND, FULL, FULL_SET, RULES, Results, SetSize, markdown
from benchmarks.training.ratings import RatingSet, read_sets, rule_classifier, source_directory
from benchmarks.training.sentiment import Score, Trained, blend, classify, examples_of, score, train
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device
from server.model.native.load import find_library
from server.model.smollm import Adapters, NoAdapters, SmolLM
from server.system.memory import keep_freed_memory
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from server.training.trainables import TrainableRows
from server.training.trained_rows import TrainedRows

RANK = 16
EPOCHS = 2
LORA_RATE, FULL_RATE = 1e-3, 3e-5


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.adapters", "Train an adapter on each of four sets and test it on all.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the sets are kept")
    parser.add_argument("--train-rows", type=int, default=500, help="maximum rows per set")
    parser.add_argument("--test-rows", type=int, default=250, help="maximum rows per set")
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
    trial = _Trial(base, sets, say, find_library(base, options.home / "native", say))
    trial.run(source)
    sizes = {rated.name: SetSize(len(rated.train), len(rated.test)) for rated in sets}
    results = Results(
        Made.by("benchmarks.adapters", arguments, quick=options.quick),
        Machine.this(options.threads),
        f"{base.name} in {str(base.dtype).removeprefix('torch.')}",
        f"LoRA r={RANK} on all seven linear modules, {EPOCHS} epochs at {LORA_RATE:g}; full fine-tuning at "
        f"{FULL_RATE:g}: neither rate was tuned",
        sizes,
        trial.scores,
        trial.seconds,
    )
    command.write(options.out, "adapters", results)
    print(markdown(results))
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
        """Train and test every adapter, one after the other."""
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
            lora=LoraSpec(rank=RANK),
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


if __name__ == "__main__":
    main()
