"""What training costs by each method: memory, storage and time, computed by the same code for all of them."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from adapters.peft.files import PeftAdapter
from adapters.store.store import AdapterStore
from benchmarks import command
from benchmarks.machine import Machine
from benchmarks.measure import Figure, percentile
from benchmarks.science.plan import CENTRES, RANKS, Store
from benchmarks.science.trial import Place, Runner, Trial, measure
from server.model.base.export import export_hugging_face
from server.training.report import peak_memory_bytes
from server.training.spec import LoraSpec
from server.training.trainables import TrainableModel, TrainableRows
from server.training.trained_rows import adapter_config

TASK = "sentiment"
ROUNDS = 3
STEPS, WARM_UP = 40, 4
"""Steps of a timed run, and those of them that aren't timed."""
CURVE_STEPS = 25
"""Steps between two measurements of a curve."""
T = TypeVar("T")


Curve = tuple[tuple[float, float], ...]
"""Seconds of training, and the loss on the validation rows."""


@dataclass(frozen=True)
class Cost:
    """One method's figures, by one kind of code. Tokens are counted without padding."""

    rank: int  # 0: full fine-tuning
    is_native: bool
    num_trainable: int
    optimizer_bytes: int  # AdamW's two moments
    checkpoint_bytes: int  # weights in fp32, and the moments
    stored_bytes: int  # the published version
    peak_memory: int  # bytes
    tokens_per_second: Figure


@dataclass(frozen=True)
class Costs:
    """The figures of all methods in all rounds."""

    machine: Machine
    model: str
    rounds: tuple[Cost, ...]

    def speeds(self, rank: int, *, is_native: bool) -> list[float]:
        """Return a method's tokens per second, by round."""
        return [one.tokens_per_second for one in self.rounds if (one.rank, one.is_native) == (rank, is_native)]

    def of(self, rank: int, *, is_native: bool) -> Cost:
        """Return a method's figures, with the median memory and speed of its rounds."""
        found = [one for one in self.rounds if (one.rank, one.is_native) == (rank, is_native)]
        return replace(
            found[0],
            peak_memory=int(percentile([one.peak_memory for one in found], 50)),
            tokens_per_second=percentile([one.tokens_per_second for one in found], 50),
        )


@dataclass(frozen=True)
class Curves:
    """Each method's loss during a training at its best rate, by rank. Native code computes it."""

    machine: Machine
    by_rank: dict[int, Curve]


def measure_costs(store: Store, place: Place, folder: Path, say: command.Say) -> None:
    """Measure costs and curves that aren't there, each in a fresh process, with all of the machine's processors.

    Curves need each method's best rate.
    """
    place = replace(place, threads=command.cores())
    machine = Machine.this(place.threads)
    if command.read(folder, "costs", Costs) is None:
        rounds = []
        for _ in range(1 if place.num_rows else ROUNDS):
            for rank in (0, *RANKS):
                for where in (place, replace(place, native=None)):
                    trial = Trial(TASK, rank, CENTRES["lora" if rank else "full"], 0)
                    rounds.append(_in_process(_cost, trial, where))
                    say(f"{trial.method}: {rounds[-1].tokens_per_second:.0f} tokens/s")
        command.write(folder, "costs", Costs(machine, place.base.name, tuple(rounds)))
    rates = {rank: store.results(TASK).best(rank) for rank in (0, *RANKS)}
    if command.read(folder, "curves", Curves) is None and all(rates.values()):
        curves = {
            rank: _in_process(_curve, Trial(TASK, rank, rate, 0), place) for rank, rate in rates.items() if rate
        }
        command.write(folder, "curves", Curves(machine, curves))


def _in_process(run: Callable[[Trial, Place], T], trial: Trial, place: Place) -> T:
    """Run in a fresh process, which has its own peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, trial, place).result()


def _cost(trial: Trial, place: Place) -> Cost:
    runner = Runner(place)
    trainable, trainer = runner.start(trial)
    steps = [trainer.run_step() for _ in range(min(STEPS, trainer.total_steps))]
    timed = steps[WARM_UP:] or steps
    peak_memory = peak_memory_bytes(runner.base.device)  # before the result is stored
    state = {name: tensor.nbytes for name, tensor in trainer.state().items()}
    return Cost(
        trial.rank,
        place.native is not None,
        trainable.masters.numel(),
        state["mean"] + state["square"],
        sum(state.values()),
        _stored_bytes(runner, trial, trainable),
        peak_memory,
        sum(step.num_tokens for step in timed) / sum(step.seconds for step in timed),
    )


def _stored_bytes(runner: Runner, trial: Trial, trainable: TrainableRows | TrainableModel) -> int:
    """Return the bytes on disk, stored as by a job."""
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(trainable, TrainableRows):
            lora = LoraSpec(trial.rank)
            adapter = PeftAdapter(adapter_config(lora), trainable.rows.weights(), runner.base.name)
            return AdapterStore(Path(scratch) / "adapters").put(adapter)
        place = Path(scratch) / "model"
        export_hugging_face(trainable.tuned(runner.base), place)
        return sum(file.stat().st_size for file in place.iterdir())


def _curve(trial: Trial, place: Place) -> Curve:
    """Train to the end. Measuring isn't timed."""
    runner = Runner(place)
    trainable, trainer = runner.start(trial)
    validation = runner.rows(trial.task).validation
    seconds = 0.0
    curve = []
    while trainer.step < trainer.total_steps:
        seconds += trainer.run_step().seconds
        if trainer.step % CURVE_STEPS == 0 or trainer.step == trainer.total_steps:
            curve.append((seconds, measure(trainable.passes, validation).loss))
    return tuple(curve)
