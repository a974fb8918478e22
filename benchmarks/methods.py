"""Full fine-tuning beside LoRA of three ranks: `python -m benchmarks.methods`.

The same rows and the same number of steps for all, each method at the best of a few learning rates, chosen by the
loss on rows that are neither trained on nor in the test. Every run is a process of its own, so that its peak
memory is its own. Writes methods.json, methods.md and methods.png.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run by its path: what Python put first is this folder, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from adapters.peft_format import PeftAdapter
from adapters.store import AdapterStore
from benchmarks import command
from benchmarks.ratings import FILES, Rated, read_sets, source_directory
from benchmarks.results import Machine
from benchmarks.sentiment import Trained, classify, examples_of, score, train
from server.allocator import keep_freed_memory
from server.model.device import choose_device
from server.model.export import export_hugging_face
from server.model.native.load import find_library
from server.model.source import resolve_base
from server.model.weights import BaseModel, load_base
from server.training.evaluate import evaluate
from server.training.init import adapter_config
from server.training.report import peak_memory_bytes
from server.training.spec import JobSpec, LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableRows

RANKS = (8, 16, 32)
RATES: dict[Method, tuple[float, ...]] = {"lora": (2e-4, 5e-4, 1e-3), "full": (5e-5, 1e-4, 2e-4)}


@dataclass(frozen=True)
class Trial:
    """One run: a method at a learning rate. `rank` is 0 for full fine-tuning."""

    rank: int
    learning_rate: float

    @property
    def method(self) -> Method:
        return "lora" if self.rank else "full"

    @property
    def title(self) -> str:
        return f"LoRA, r={self.rank}" if self.rank else "full fine-tuning"


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    num_trainable: int
    share: float  # of the base's parameters
    peak_memory: int  # bytes, of training
    bytes_stored: int
    seconds: float  # inside the steps
    tokens_per_second: float
    tuning_loss: float  # nats per counted token, on the rows that choose the learning rate
    test_loss: float
    test_accuracy: float  # of labels


@dataclass(frozen=True)
class _Job:
    trial: Trial
    base: Path
    source: Path
    data: str
    counts: tuple[int, int, int]  # of rows to train on, to choose the learning rate by, and to test on
    threads: int
    native: Path  # where native code is compiled to


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Run it all; every trial's outcome. The best of each method are printed; all are written."""
    from benchmarks.methods_report import chart, markdown  # it knows the types above

    parser = command.parser("benchmarks.methods", "Compares full fine-tuning with LoRA of three ranks.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the data is kept")
    parser.add_argument("--data", choices=list(FILES), default="movies", help="the set to train on")
    parser.add_argument("--rows", type=int, default=280, help="to train on, once")
    options = parser.parse_args(arguments)
    say = command.speaker()
    options.out.mkdir(parents=True, exist_ok=True)
    source = source_directory(options.cache, say)
    converted = resolve_base(options.model, options.home, progress=say)
    num_train, num_tuning, num_test = (16, 8, 8) if options.quick else (options.rows, 60, 150)
    outcomes, native = [], options.home / "native"
    for rank in (*RANKS, 0):
        for rate in RATES["lora" if rank else "full"][: 1 if options.quick else None]:
            counts = (num_train, num_tuning, num_test)
            job = _Job(Trial(rank, rate), converted, source, options.data, counts, options.threads, native)
            outcomes.append(_in_a_process(job))
            found = outcomes[-1]
            say(
                f"{found.trial.title} at {rate:g}: {found.tokens_per_second:.0f} tokens/s, tuning loss "
                f"{found.tuning_loss:.4f}, test loss {found.test_loss:.4f}, accuracy {found.test_accuracy:.3f}"
            )
    machine = Machine.this(options.threads)
    work = (
        f"{Path(options.model).name}; {num_train} sentences of {options.data}, once, in steps of 8 rows; AdamW; "
        f"each method at the best of its learning rates by the loss on {num_tuning} other sentences; "
        f"{num_test} held-out sentences"
    )
    text = markdown(machine, work, outcomes, quick=options.quick)
    command.write(
        options.out, "methods", {"machine": asdict(machine), "outcomes": list(map(asdict, outcomes))}, text
    )
    chart(best(outcomes), options.out / "methods.png")
    return outcomes


def best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Each method's, by the loss on the tuning rows; full fine-tuning first."""
    ranks = sorted({outcome.trial.rank for outcome in outcomes})
    return [
        min((outcome for outcome in outcomes if outcome.trial.rank == rank), key=lambda o: o.tuning_loss)
        for rank in ranks
    ]


def _in_a_process(job: _Job) -> Outcome:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, job).result()


def _run(job: _Job) -> Outcome:
    """In a fresh process."""
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    trial = job.trial
    base = load_base(job.base, choose_device("cpu", "auto")[1])
    num_train, num_tuning, num_test = job.counts
    sets = read_sets(job.source, num_train=num_train, num_tuning=num_tuning, num_test=num_test)
    (rated,) = (rated for rated in sets if rated.name == job.data)
    spec = JobSpec(
        trial.title,
        method=trial.method,
        lora=LoraSpec(rank=trial.rank or 1, alpha=2 * (trial.rank or 1)),
        training=TrainingSpec(epochs=1, learning_rate=trial.learning_rate),
    )
    library = find_library(base, [job.native], print)
    trained = train(base, spec, examples_of(base, rated.train), lambda line: None, library)
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
    )


def _loss(base: BaseModel, trained: Trained, sentences: Sequence[Rated]) -> float:
    return evaluate(trained.model, trained.adapters, examples_of(base, sentences)).loss


def _accuracy(base: BaseModel, trained: Trained, sentences: Sequence[Rated]) -> float:
    return score(classify(base, trained.model, trained.adapters, sentences), sentences).accuracy


def _store(base: BaseModel, spec: JobSpec, trained: Trained) -> int:
    """Bytes on the disk, as a job stores it."""
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(trained.trainable, TrainableRows):
            adapter = PeftAdapter(adapter_config(spec.lora), trained.trainable.rows.weights(), base.name)
            return AdapterStore(Path(scratch) / "adapters").put(adapter)
        place = Path(scratch) / "model"
        export_hugging_face(trained.trainable.tuned(base), place)
        return sum(file.stat().st_size for file in place.iterdir())


if __name__ == "__main__":
    main()
