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
from benchmarks.science.plan import RANKS, Results, Store
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
    machine: Machine
    model: str
    costs: tuple[Cost, ...]  # of all rounds
    curves: dict[int, Curve]  # of native code, by rank

    def of(self, rank: int, *, is_native: bool) -> Cost:
        """Return a method's figures, with the median memory and speed of its rounds."""
        rounds = [one for one in self.costs if (one.rank, one.is_native) == (rank, is_native)]
        return replace(
            rounds[0],
            peak_memory=int(percentile([one.peak_memory for one in rounds], 50)),
            tokens_per_second=percentile([one.tokens_per_second for one in rounds], 50),
        )


def measure_costs(store: Store, place: Place, folder: Path, say: command.Say) -> None:
    """Measure all methods in turn, each in a fresh process, unless the results are there.

    Needs each method's best rate, and uses all of the machine's processors.
    """
    if command.read(folder, "costs", Costs) is not None:
        return
    place = replace(place, threads=command.cores())
    in_torch = replace(place, native=None)
    tuned = {rank: _tuned(store.results(TASK), rank) for rank in (0, *RANKS)}
    costs = []
    for _ in range(1 if place.num_rows else ROUNDS):
        for trial in tuned.values():
            for where in (place, in_torch):
                costs.append(_in_process(_cost, trial, where))
                say(f"{trial.method}: {costs[-1].tokens_per_second:.0f} tokens/s")
    curves = {rank: _in_process(_curve, trial, place) for rank, trial in tuned.items()}
    command.write(folder, "costs", Costs(Machine.this(place.threads), place.base.name, tuple(costs), curves))


def _tuned(results: Results, rank: int) -> Trial:
    rate = results.best(rank)
    if rate is None:
        raise SystemExit(f"the best rates on {results.task} aren't known yet: run the part quality first")
    return Trial(results.task, rank, rate, 0)


def _in_process(run: Callable[[Trial, Place], T], trial: Trial, place: Place) -> T:
    """Run in a fresh process, which has its own peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, trial, place).result()


def _cost(trial: Trial, place: Place) -> Cost:
    runner = Runner(place)
    trainable, trainer = runner.start(trial)
    steps = [trainer.run_step() for _ in range(min(STEPS, trainer.total_steps))]
    timed = steps[WARM_UP:] or steps
    state = {name: tensor.nbytes for name, tensor in trainer.state().items()}
    return Cost(
        trial.rank,
        place.native is not None,
        trainable.masters.numel(),
        state["mean"] + state["square"],
        sum(state.values()),
        _stored_bytes(runner, trial, trainable),
        peak_memory_bytes(runner.base.device),
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
