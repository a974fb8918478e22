"""One run of the comparison of methods: trained in its own process, measured, and stored in a file.

A stored run isn't repeated, so an interrupted comparison resumes.
"""

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.peft.files import PeftAdapter
from adapters.store.store import AdapterStore
from benchmarks import command
from benchmarks.measure import Figure
from benchmarks.training.ratings import Rated, read_sets
from benchmarks.training.sentiment import Trained, classify, examples_of, score, train
from server.model.base.export import export_hugging_face
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device
from server.model.native.load import find_library
from server.system.memory import keep_freed_memory
from server.training.evaluate import evaluate
from server.training.report import peak_memory_bytes
from server.training.spec import JobSpec, LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableRows
from server.training.trained_rows import adapter_config
from server.training.trainer import TrainingDiverged


@dataclass(frozen=True)
class Trial:
    """A method, a learning rate and a seed. `rank` is 0 for full fine-tuning."""

    rank: int
    learning_rate: float
    seed: int
    num_rows: int  # to train on, for one epoch
    num_tuning: int  # 0: not measured
    num_test: int  # 0: not measured
    native: bool = True  # if native code supports it

    @property
    def method(self) -> Method:
        return "lora" if self.rank else "full"

    @property
    def title(self) -> str:
        return f"LoRA, r={self.rank}" if self.rank else "full fine-tuning"

    @property
    def key(self) -> str:
        """Name of its file."""
        what = f"r{self.rank}" if self.rank else "full"
        code = "" if self.native else "-torch"
        rows = f"{self.num_rows}-{self.num_tuning}-{self.num_test}"
        return f"{what}{code}-{self.learning_rate:.4g}-seed{self.seed}-{rows}"


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    num_trainable: int
    share: float  # of the base's parameters
    peak_memory: int  # bytes, of training
    bytes_stored: int
    seconds: Figure  # inside optimizer steps
    tokens_per_second: Figure
    tuning_loss: Figure  # nats per counted token, on the tuning rows
    test_loss: Figure
    test_accuracy: Figure  # of labels
    computed_by: str  # native code or torch


@dataclass(frozen=True)
class Place:
    """The environment of a run."""

    base: Path  # converted
    digest: str  # of the base
    source: Path
    data: str
    threads: int
    native: Path  # build folder of native code
    kept: Path  # folder of the outcomes


@dataclass(frozen=True)
class _Kept:
    """A stored outcome, valid for one base, one data set and one number of threads."""

    digest: str
    data: str
    threads: int
    outcome: Outcome


def outcome_of(trial: Trial, place: Place) -> tuple[Outcome, bool]:
    """Return the outcome, and whether it was stored before."""
    kept = command.read(place.kept, trial.key, _Kept)
    if kept is not None and (kept.digest, kept.data, kept.threads) == (place.digest, place.data, place.threads):
        return kept.outcome, True
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        outcome = pool.submit(_run, trial, place).result()
    command.write(place.kept, trial.key, _Kept(place.digest, place.data, place.threads, outcome))
    return outcome, False


def _run(trial: Trial, place: Place) -> Outcome:
    """Run the trial in a fresh process. A run that diverges has no figures."""
    keep_freed_memory()
    torch.set_num_threads(place.threads)
    base = load_base(place.base, choose_device("cpu", "auto")[1])
    counts = {"num_train": trial.num_rows, "num_tuning": trial.num_tuning, "num_test": trial.num_test}
    (rated,) = (rated for rated in read_sets(place.source, **counts) if rated.name == place.data)
    spec = JobSpec(
        f"{trial.title} at {trial.learning_rate:.3g}",
        method=trial.method,
        lora=LoraSpec(rank=trial.rank or 1),
        training=TrainingSpec(epochs=1, learning_rate=trial.learning_rate, seed=trial.seed),
    )
    library = find_library(base, place.native, print) if trial.native else None
    computed_by = "native code" if library is not None else "torch"
    nan = float("nan")
    try:
        trained = train(base, spec, examples_of(base, rated.train), print, library)
    except TrainingDiverged:
        return Outcome(trial, 0, nan, 0, 0, nan, nan, nan, nan, nan, computed_by)
    memory = peak_memory_bytes(base.device)
    num_trainable = trained.trainable.masters.numel()
    return Outcome(
        trial=trial,
        num_trainable=num_trainable,
        share=num_trainable / base.weights.num_parameters,
        peak_memory=memory,
        bytes_stored=_store(base, spec, trained),
        seconds=sum(step.seconds for step in trained.steps),
        tokens_per_second=trained.tokens_per_second,
        tuning_loss=_loss(base, trained, rated.tuning),
        test_loss=_loss(base, trained, rated.test),
        test_accuracy=_accuracy(base, trained, rated.test),
        computed_by=computed_by,
    )


def _loss(base: BaseModel, trained: Trained, sentences: Sequence[Rated]) -> float:
    if not sentences:
        return float("nan")
    return evaluate(trained.trainable.passes, examples_of(base, sentences)).loss


def _accuracy(base: BaseModel, trained: Trained, sentences: Sequence[Rated]) -> float:
    if not sentences:
        return float("nan")
    return score(classify(base, trained.model, trained.adapters, sentences), sentences).accuracy


def _store(base: BaseModel, spec: JobSpec, trained: Trained) -> int:
    """Return the bytes on disk, stored as by a job."""
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(trained.trainable, TrainableRows):
            adapter = PeftAdapter(adapter_config(spec.lora), trained.trainable.rows.weights(), base.name)
            return AdapterStore(Path(scratch) / "adapters").put(adapter)
        place = Path(scratch) / "model"
        export_hugging_face(trained.trainable.tuned(base), place)
        return sum(file.stat().st_size for file in place.iterdir())
