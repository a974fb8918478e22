"""Attempts at real training jobs without a process around them, which end where a test wants them to end.

What a process does is the same, but for the pipe to its worker: `TrainingAttempt` trains, and the queue, the
catalog and the store are real.
"""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog, Version
from adapters.lora import LoraWeights
from adapters.peft.files import PeftAdapter
from adapters.store.store import AdapterStore
from server.jobs.files import JobFiles
from server.jobs.jobs import Job, Jobs
from server.jobs.leases import Claim, Leases
from server.jobs.reporter import Leave
from server.jobs.room import require_room
from server.jobs.scoring import complete
from server.jobs.train_job import TrainingAttempt
from server.model.base.weights import BaseModel
from server.model.text.chat import PromptEncoder
from server.storage.home import Home
from server.storage.places import Storage
from server.training.encoding import Reference, RowEncoder
from server.training.job_data import DataFacts, JobData
from server.training.rows import CompletionRow
from server.training.spec import JobSpec
from tests.server.jobs.merge_kit import library_of, publish

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

TIMES = ("wall_seconds", "tokens_per_second", "peak_memory_bytes")
"""What a report says of time and memory: no two attempts agree on them."""

Interruption = Literal["leave", "kill"]


class Killed(BaseException):
    """Stands for kill -9: nothing after it happens."""


@dataclass
class Reporter:
    """A job's reporter that ends the attempt at one moment: before or after one of its calls.

    Moments are counted from 0, over `num_moments` of an attempt that ran to its end.
    """

    leases: Leases
    claim: Claim
    end_at: int | None = None
    how: Interruption = "kill"
    on_metrics: Callable[[], object] = lambda: None
    num_moments: int = 0
    transferred: list[int] = field(default_factory=list)  # bytes of blocks that were announced
    computed: list[int] = field(default_factory=list)  # tokens of them

    def yield_or_leave(self) -> None:
        self._moment()

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        self.transferred.append(num_bytes)
        return nullcontext()

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        self.computed.append(num_tokens)
        return nullcontext()

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        self._moment()

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        self.on_metrics()
        self._around(lambda: self.leases.add_metrics(self.claim, message, data))

    def flush(self) -> None:
        self.leases.flush(self.claim)

    def checkpointed(self, step: int) -> None:
        self._around(lambda: self.leases.checkpointed(self.claim, step))

    def _around(self, write: Callable[[], object]) -> None:
        self._moment()
        write()
        self._moment()

    def _moment(self) -> None:
        moment, self.num_moments = self.num_moments, self.num_moments + 1
        if moment == self.end_at:
            raise Leave if self.how == "leave" else Killed


def rows_of_codes(base: BaseModel, first: int, count: int) -> tuple[RowEncoder, list[CompletionRow]]:
    eos = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos)
    codes = list(HTTPStatus)[first : first + count]
    return encoder, [CompletionRow(str(code.value), f" {code.phrase}") for code in codes]


def job_data(base: BaseModel, num_rows: int = 8, num_held_out: int = 3, num_references: int = 1) -> JobData:
    """HTTP codes and their phrases; other ones are held out."""
    encoder, rows = rows_of_codes(base, 0, num_rows)
    _, held_out = rows_of_codes(base, num_rows, num_held_out)
    examples = encoder.encode_all(rows, 48).examples
    facts = DataFacts(
        "d",
        num_rows,
        examples.num_tokens,
        examples.num_targets,
        0,
        "v" if held_out else None,
        num_held_out,
        kinds={"completion": num_rows},
    )
    validation = encoder.encode_all(held_out, 48).examples if held_out else None
    references = encoder.references(held_out)[:num_references]
    trained = encoder.trained_references(rows, examples.num_tokens, 48) if num_references else []
    return JobData(examples, validation, references, facts, base.digest, trained)


def exact_match(
    base: BaseModel,
    weights: LoraWeights | None,
    references: Sequence[Reference],
    yield_or_leave: Callable[[], None] = lambda: None,
    library: ctypes.CDLL | None = None,
) -> list[bool] | None:
    """Return `complete`'s comparisons, without samples."""
    return complete(base, weights, (), references, yield_or_leave, library=library)[1]


def with_learnable_end(base: BaseModel) -> BaseModel:
    """The tiny base with another end token: an adapter can't make its own one the likeliest token."""
    return replace(base, config=replace(base.config, eos_token_ids=(60,)))


def one_answer(base: BaseModel, num_rows: int = 24, num_held_out: int = 0) -> JobData:
    """Prompts with the same completion, which a tiny base can remember. Those held out have another one.

    Without held-out rows, all rows are held out, too.
    """
    encoder, found = rows_of_codes(base, 0, num_rows + num_held_out)
    rows = [replace(row, completion=" OK") for row in found[:num_rows]]
    held_out = found[num_rows:]
    train, others = (encoder.encode_all(of, 48).examples for of in (rows, held_out or rows))
    facts = DataFacts("d", num_rows, train.num_tokens, train.num_targets, 0, "v", len(others))
    references = encoder.references(held_out or rows)
    return JobData(train, others, references, facts, base.digest, encoder.trained_references(rows, 1, 48))


def _standing_still() -> sa.ColumnElement[float]:
    """A clock by which nothing takes time: what was let go can be claimed at once."""
    return sa.literal(1e9, sa.Float(53))


@dataclass
class Shop:
    """A HOME with its queue, catalog and store, for jobs of one base; of one machine, where there is a bucket."""

    home: Path
    engine: sa.Engine
    base: BaseModel
    bucket: "Bucket | None" = None
    jobs: Jobs = field(init=False)
    leases: Leases = field(init=False)
    catalog: Catalog = field(init=False)
    store: AdapterStore = field(init=False)
    files: JobFiles = field(init=False)

    def __post_init__(self) -> None:
        storage = Storage(Home(self.home), self.bucket)
        records = storage.records()
        self.jobs, self.leases = Jobs(self.engine), Leases(self.engine, records, now=_standing_still)
        self.catalog = Catalog(self.engine, records)
        self.store, self.files = storage.adapters(), JobFiles(self.home, self.bucket)

    def publish(self, name: str, adapter: PeftAdapter) -> Version:
        return publish(self.catalog, self.store, name, adapter)

    def submit(
        self, spec: JobSpec, data: JobData, job_id: str = "job", kept: Mapping[str, object] | None = None
    ) -> Job:
        """`kept` is the job's own data."""
        data.save(self.files.directory(job_id))
        self.files.keep(job_id)
        steps = spec.training.total_steps(data.facts.num_rows)
        stored = {**asdict(data.facts), "total_steps": steps, **(kept or {})}
        return self.jobs.submit(spec, job_id=job_id, data=stored)

    def attempt(
        self,
        end_at: int | None = None,
        how: Interruption = "kill",
        on_metrics: Callable[[], object] = lambda: None,
    ) -> Reporter:
        """One attempt at the next job, ended as its worker would have it; who listened to it.

        `on_metrics` is called before a step's metrics are stored. Raises what the attempt raises.
        """
        claim = self.leases.claim("worker")
        assert claim is not None, "no job waits"
        self.files.fetch(claim.job_id)
        job = self.jobs.get(claim.job_id)
        assert isinstance(job.spec, JobSpec)
        reporter = Reporter(self.leases, claim, end_at, how, on_metrics)
        library = library_of(self.catalog, self.store, self.base)
        storage = Storage(Home(self.home), self.bucket)
        room = partial(require_room, self.engine, storage, job)
        attempt = TrainingAttempt(
            job, job.spec, claim, self.leases, library, self.base, reporter, storage, require_room=room
        )
        try:
            attempt.run()
        except Leave:
            self.leases.release(claim)
        except Killed:
            self.leases.crashed(claim, "killed by SIGKILL", max_delay=0.0)
        return reporter

    def result(self, job_id: str = "job") -> dict[str, object]:
        """All that a job that succeeded leaves behind, but for times and names."""
        job = self.jobs.get(job_id)
        found = self.jobs.report(job_id)
        assert found is not None, job
        report = json.loads(json.dumps(found).replace(f"{job.name}@", "name@"))
        progress = {key: value for key, value in job.progress.items() if key not in TIMES}
        events = [event for event in self.jobs.events(job_id, limit=10_000) if event.type == "metrics"]
        return {
            "digest": job.adapter and job.adapter["digest"],
            "progress": progress,
            "metrics": job.metrics,
            "report": {key: value for key, value in report.items() if key not in (*TIMES, "name", "config")},
            "events": [(event.message, event.data) for event in events],
        }
