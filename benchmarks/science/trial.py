"""One run of the comparison: a method trained on a task at one rate and seed, and measured."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch

from adapters.lora import MODULES
from benchmarks.measure import Figure
from benchmarks.science.answers import read_answers
from benchmarks.training.tasks import MAX_LENGTH, TASKS
from server.model.base.weights import load_base
from server.model.device import choose_device
from server.model.native.load import find_library
from server.model.text.chat import PromptEncoder
from server.system.memory import keep_freed_memory
from server.training.encoding import Example, Examples, RowEncoder
from server.training.passes import MicroBatch, Pass
from server.training.rows import Row, TextRow
from server.training.spec import LoraSpec, TrainingSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer, TrainingDiverged, pack

TARGETS = {
    "all": MODULES,
    "q·v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed-forward": ("gate_proj", "up_proj", "down_proj"),
}
MAX_TOKENS = 2048
"""Maximum tokens of a measured batch."""
NUM_TEXTS = 40
"""The number of unrelated texts, from Python's own help."""


@dataclass(frozen=True)
class Trial:
    """A task, a method, a learning rate and a seed. `rank` is 0 for full fine-tuning; a rate of 0 is the base."""

    task: str
    rank: int
    learning_rate: float
    seed: int
    targets: str = "all"
    is_test: bool = False  # measured on the test rows; otherwise on the validation rows

    @property
    def method(self) -> str:
        if not self.learning_rate:
            return "base"
        if not self.rank:
            return "full"
        return f"r={self.rank}" if self.targets == "all" else f"{self.targets}, r={self.rank}"

    @property
    def key(self) -> str:
        part = "test" if self.is_test else "validation"
        return f"{self.task}, {self.method}, {self.learning_rate:g}, seed {self.seed}, {part}"


@dataclass(frozen=True)
class Outcome:
    """What a run measured. Losses are in nats per token, without end tokens. NaN: the training diverged."""

    trial: Trial
    num_steps: int
    num_trainable: int
    loss: Figure  # on the task's completions
    share_right: Figure  # of rows whose completion, with its end token, is the greedy one
    token_accuracy: Figure
    text_loss: Figure  # on unrelated text
    answers_loss: Figure  # on the base's own answers
    losses: tuple[float, ...] = ()  # of a test, by row: the sum over its tokens
    are_right: str = ""  # of a test, by row: 1 or 0


@dataclass(frozen=True)
class Description:
    """What a task consists of."""

    title: str
    measure: str  # what the share of right rows is called
    epochs: int
    num_rows: tuple[int, int, int]  # to train on, to choose rates by, and to test on
    num_trained: int  # tokens, over all epochs
    num_tokens: tuple[int, ...]  # of each test row's completion, without its end token


@dataclass(frozen=True)
class Place:
    """What all runs share."""

    base: Path  # converted
    native: Path | None  # the build folder of native code; None: computed in torch
    cache: Path  # where the tasks' data is
    answers: Path  # the folder with the base's own answers
    threads: int
    num_rows: int | None = None  # a reduced run's rows of each part


@dataclass(frozen=True)
class Measured:
    """A model's results on some rows, by row.

    Losses are sums over a row's tokens, in nats. They and the numbers of tokens leave out a row's end token.
    """

    losses: list[float]
    num_tokens: list[int]
    num_right: list[int]  # tokens
    are_right: list[bool]  # rows whose completion, with its end token, is the greedy one

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / sum(self.num_tokens)


def measure(passes: Pass, examples: Sequence[Example]) -> Measured:
    """Measure the examples' targets. The last target of each is its end token."""
    measured = Measured([], [], [], [])
    by_row: dict[int, list[tuple[float, bool]]] = {}
    for indices in pack([len(example.token_ids) for example in examples], MAX_TOKENS):
        found = passes.measure(MicroBatch.of([examples[index] for index in indices]))
        targets = iter(zip(found.losses, found.are_right, strict=True))
        for index in indices:
            by_row[index] = list(islice(targets, sum(examples[index].is_target)))
    for _, of_row in sorted(by_row.items()):
        losses, are_right = zip(*of_row, strict=True)
        measured.losses.append(math.fsum(losses[:-1]))
        measured.num_tokens.append(len(of_row) - 1)
        measured.num_right.append(sum(are_right[:-1]))
        measured.are_right.append(all(are_right))
    return measured


@dataclass(frozen=True)
class Rows:
    """A task's encoded rows: to train on, to choose rates by, and to test on."""

    title: str
    measure: str
    epochs: int
    train: Examples
    validation: Examples
    test: Examples


class Runner:
    """Trains on one base, and measures."""

    def __init__(self, place: Place) -> None:
        keep_freed_memory()
        torch.set_num_threads(place.threads)
        self._place = place
        self.base = load_base(place.base, choose_device("cpu", "auto")[1])
        self._library = None if place.native is None else find_library(self.base, place.native, print)
        ends = self.base.config.eos_token_ids
        self._encoder = RowEncoder(PromptEncoder(self.base.tokenizer), ends[0], ends)
        self._rows: dict[str, Rows] = {}
        self._texts = self._encoded([TextRow(text) for _, text in sorted(topics.items())[:NUM_TEXTS]])
        self._answers = self._encoded([answer.row for answer in read_answers(place.answers)])

    def describe(self, name: str) -> Description:
        """Return what the task consists of."""
        rows = self.rows(name)
        parts = (rows.train, rows.validation, rows.test)
        train, validation, test = map(len, parts)
        return Description(
            rows.title,
            rows.measure,
            rows.epochs,
            (train, validation, test),
            rows.epochs * rows.train.num_tokens,
            tuple(sum(example.is_target) - 1 for example in rows.test),
        )

    def run(self, trial: Trial) -> Outcome:
        """Train and measure."""
        trainable, trainer = self.start(trial)
        num_trainable = trainable.masters.numel()
        try:
            while trial.learning_rate and trainer.step < trainer.total_steps:
                trainer.run_step()
        except TrainingDiverged:
            nan = math.nan
            return Outcome(trial, trainer.step, num_trainable, nan, nan, nan, nan, nan)
        rows = self.rows(trial.task)
        found = measure(trainable.passes, rows.test if trial.is_test else rows.validation)
        return Outcome(
            trial,
            trainer.step,
            num_trainable,
            found.loss,
            sum(found.are_right) / len(found.are_right),
            sum(found.num_right) / sum(found.num_tokens),
            measure(trainable.passes, self._texts).loss,
            measure(trainable.passes, self._answers).loss,
            tuple(round(loss, 4) for loss in found.losses) if trial.is_test else (),
            "".join("01"[is_right] for is_right in found.are_right) if trial.is_test else "",
        )

    def start(self, trial: Trial) -> tuple[TrainableRows | TrainableModel, Trainer]:
        """Return what is trained, and its trainer before the first step."""
        trainable: TrainableRows | TrainableModel
        if trial.rank:
            lora = LoraSpec(trial.rank, target_modules=TARGETS[trial.targets])
            start, _ = initial_weights(lora, self.base, trial.seed)
            trainable = trainable_rows(
                self.base, start, None, max_length=MAX_LENGTH, dropout=lora.dropout, library=self._library
            )
        else:
            trainable = TrainableModel(self.base, max_length=MAX_LENGTH, library=self._library)
        rows = self.rows(trial.task)
        training = TrainingSpec(epochs=rows.epochs, learning_rate=trial.learning_rate, seed=trial.seed)
        return trainable, Trainer(trainable, rows.train, training)

    def rows(self, name: str) -> Rows:
        """Return a task's encoded rows."""
        if name not in self._rows:
            task = TASKS[name](self._place.cache, print)
            parts = (task.train, task.validation, task.test)
            train, validation, test = (self._encoded(part[: self._place.num_rows]) for part in parts)
            self._rows[name] = Rows(task.title, task.measure, task.epochs, train, validation, test)
        return self._rows[name]

    def _encoded(self, rows: Sequence[Row]) -> Examples:
        return self._encoder.encode_all(rows, MAX_LENGTH).examples


_runners: dict[Place, Runner] = {}


def run(trial: Trial, place: Place) -> tuple[Outcome, float]:
    """Run the trial in this process, which keeps the base for the next one. Return its seconds, too."""
    runner = _runner(place)
    started = time.perf_counter()
    return runner.run(trial), time.perf_counter() - started


def describe(task: str, place: Place) -> Description:
    """Return `Runner.describe` in this process."""
    return _runner(place).describe(task)


def _runner(place: Place) -> Runner:
    if place not in _runners:
        _runners[place] = Runner(place)
    return _runners[place]
