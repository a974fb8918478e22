"""From a checked body to a job in the queue: its rows split, tokenized and stored beside its specification.

Everything that POST /train can refuse is refused here, before anything is stored, and a job is in the queue only
once its files are on the disk. Everything blocks, on disk or on the tokenizer: call it in a thread.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.durable import new_directory
from adapters.errors import FieldError, InDoubt, InvalidInput, NotFound
from adapters.expression import Term
from adapters.library import Library
from adapters.pinned import Pinned
from server.api.telemetry.facts import facts
from server.api.train.rows import JobRows, choose_rows
from server.api.train.schemas import MAX_STEPS, TrainBody
from server.api.train.spec import build_spec, parent_terms
from server.counted import counted
from server.errors import Unavailable
from server.training.data.canonical_rows import CanonicalRows
from server.training.data.encoding import RowEncoder, texts_of
from server.training.data.files import RowSources
from server.training.data.job_data import DataFacts, JobData
from server.training.data.split import overlap
from server.training.queue.job_files import TRACEPARENT_NAME, JobFiles
from server.training.queue.jobs import FINE_TUNING, Job, Jobs
from server.training.spec import JobSpec, TrainingSpec

if TYPE_CHECKING:
    from adapters.objects.bucket import Bucket


@dataclass(frozen=True)
class Prepared:
    """A job that could be queued. `source` says where the rows came from, as the body did."""

    spec: JobSpec
    data: JobData
    source: Mapping[str, object]
    used: frozenset[str]  # ids of data sets and files
    warnings: tuple[str, ...]  # of the adapter to go on from, and of the rows

    @property
    def total_steps(self) -> int:
        return self.spec.training.total_steps(self.data.facts.num_rows)

    @property
    def facts(self) -> Mapping[str, object]:
        """What is stored of the data with the job's record."""
        return asdict(self.data.facts) | {"total_steps": self.total_steps, "source": dict(self.source)}


class Submissions:
    """Takes jobs for one base. `max_length` is what the base can read, in tokens."""

    def __init__(
        self,
        home: Path,
        jobs: Jobs,
        sources: RowSources,
        library: Library,
        encoder: RowEncoder,
        max_length: int,
        base_digest: str,
        bucket: "Bucket | None" = None,
    ) -> None:
        self._files = JobFiles(home, bucket)
        self._jobs = jobs
        self._sources = sources
        self._library = library
        self._encoder = encoder
        self._max_length = max_length
        self._base_digest = base_digest

    def of(self, jobs: Jobs, sources: RowSources, library: Library) -> "Submissions":
        """The same for a project."""
        other = copy(self)
        other._jobs, other._sources, other._library = jobs, sources, library
        return other

    def submit(
        self,
        body: TrainBody,
        idempotency_key: str | None,
        fine_tuning: Mapping[str, object] | None = None,
        require_room: Callable[[], None] = lambda: None,
    ) -> Job:
        """Queue the job, or return the one that the key belongs to. `require_room` is called before a new one.

        `fine_tuning` is stored with it as `server.training.queue.jobs.FINE_TUNING` has it.
        Raises InvalidInput, NotFound (rows, or the parent), Conflict (the parent, or a latest version to be
        improved on, is of another base's shapes), QueueFull; OSError where nothing can be stored.
        """
        digest = _digest(body, fine_tuning)
        kept = {} if fine_tuning is None else {FINE_TUNING: dict(fine_tuning)}
        if (first := self._jobs.repeated(idempotency_key, digest)) is not None:
            return first
        require_room()
        job_id = f"job-{secrets.token_hex(8)}"
        directory, told = self._files.directory(job_id), facts.get()
        # the parent's bytes are held until the job itself holds them
        with self.prepared(body) as prepared:
            try:
                with new_directory(directory) as unfinished:
                    prepared.data.save(unfinished)
                    if told is not None and told.span is not None:
                        (unfinished / TRACEPARENT_NAME).write_text(told.span.traceparent, encoding="ascii")
                self._files.keep(job_id)
                job = self._jobs.submit(
                    prepared.spec,
                    job_id=job_id,
                    data={**prepared.facts, **kept},
                    used=prepared.used,
                    idempotency_key=idempotency_key,
                    body_digest=digest,
                    warnings=prepared.warnings if fine_tuning is None else (*prepared.warnings, *_cut(prepared)),
                )
            except InDoubt:  # it may be queued: a sweep takes the files, should there be no such job
                raise
            except BaseException:
                self._drop(job_id)
                raise
        if job.id != job_id:  # somebody was quicker with the same key
            self._drop(job_id)
        if told is not None:
            told.job_id = job.id
        return job

    def _drop(self, job_id: str) -> None:
        with suppress(Unavailable):  # a sweep takes what is old and no job's
            self._files.remove(job_id)

    @contextmanager
    def prepared(self, body: TrainBody, max_bytes: int | None = None) -> Iterator[Prepared]:
        """Do everything but queue the job; nothing is stored. Raises as `submit` does.

        With `max_bytes`, only the first rows with about that much text are encoded, of those to train on and
        of those held out. Their tokens are scaled to all rows, and a warning says so.
        """
        terms = parent_terms(body, self._library.base_name)
        pinned = self._library.pin(terms) if terms else Pinned(())
        try:
            spec = build_spec(body, self._library, pinned, self._max_length)
            rows = choose_rows(body, self._sources)
            _check_rows(spec, rows)
            if spec.publish_if == "improves_latest":  # which is measured, too: it must go with the base
                with suppress(NotFound):
                    self._library.pin([Term(spec.name)], "name").release()
            data, warnings = self._encode(spec.training, rows, max_bytes)
            warnings = (*pinned.warnings, *rows.warnings, *warnings)
            yield Prepared(spec, data, rows.source, rows.used, warnings)
        finally:
            pinned.release()

    def _encode(
        self, training: TrainingSpec, rows: JobRows, max_bytes: int | None
    ) -> tuple[JobData, tuple[str, ...]]:
        """Return what is stored, and warnings of the rows that are trained on."""
        length, overlong = training.max_length, training.overlong
        first, held_out = _first(rows.train, max_bytes), _first(rows.validation, max_bytes)
        try:
            train = self._encoder.encode_all(first, length, overlong, (rows.name,))
            loc = (rows.validation_name or rows.name,)
            validation = self._encoder.encode_all(held_out, length, overlong, loc)
        except InvalidInput:
            if rows.validation_name is None:  # a share: the faults are to count rows as they were sent
                self._encoder.encode_all(_first(rows.rows, max_bytes), length, overlong, (rows.name,))
            raise
        scale = len(rows.train) / max(len(first), 1)
        facts = DataFacts(
            digest=rows.train.digest(),
            num_rows=len(rows.train),
            num_tokens=round(train.examples.num_tokens * scale),
            num_targets=round(train.examples.num_targets * scale),
            num_truncated=round(train.num_truncated * scale),
            validation_digest=rows.validation.digest() if rows.validation else None,
            num_validation_rows=len(rows.validation),
            num_validation_truncated=round(
                validation.num_truncated * len(rows.validation) / max(len(held_out), 1)
            ),
            num_overlapping=overlap(rows.train, rows.validation),
        )
        data = JobData(
            train=train.examples,
            validation=validation.examples if held_out else None,
            references=self._encoder.references(held_out, max_prompt=self._max_length),
            facts=facts,
            base_digest=self._base_digest,
        )
        num_encoded, num_rows = len(first) + len(held_out), len(rows.train) + len(rows.validation)
        if num_encoded == num_rows:
            return data, train.warnings
        sampled = f"only {num_encoded:,} of {num_rows:,} rows were tokenized: counts of tokens are estimates"
        return data, (*train.warnings, sampled)


def _first(rows: CanonicalRows, max_bytes: int | None) -> CanonicalRows:
    """Return the first rows that have up to `max_bytes` of text, and one at least if there is any; None: all."""
    if max_bytes is not None:
        num_bytes = 0
        for number, row in enumerate(rows):
            num_bytes += sum(len(text.encode()) for text in texts_of(row))
            if num_bytes > max_bytes and number:
                return rows[:number]
    return rows


def _cut(prepared: Prepared) -> Iterator[str]:
    """What OpenAI's form of a job has no field for: how many rows are truncated."""
    facts = prepared.data.facts
    if number := facts.num_truncated + facts.num_validation_truncated:
        most = prepared.spec.training.max_length
        yield (
            f"cut after {counted(most, 'token')}, the most of a row: {counted(number, 'row')}; "
            "POST /train takes a file's id as dataset, and training.max_length"
        )


def _check_rows(spec: JobSpec, rows: JobRows) -> None:
    """Raises InvalidInput on what can't be had from so many rows."""
    faults = []
    training = spec.training
    if not rows.validation:
        needs = "needs held-out rows: set validation"
        if spec.publish_if != "always":
            faults.append(FieldError(("publish_if",), needs))
        if training.eval_steps is not None:
            faults.append(FieldError(("training", "eval_steps"), needs))
    if (steps := training.total_steps(len(rows.train))) > MAX_STEPS:
        faults.append(FieldError(("training", "epochs"), f"come to {steps} steps; there may be {MAX_STEPS}"))
    if faults:
        raise InvalidInput(faults)


def _digest(body: TrainBody, fine_tuning: Mapping[str, object] | None) -> str:
    """Equal for bodies that mean the same."""
    fields = body.model_dump(mode="json") | ({} if fine_tuning is None else {FINE_TUNING: fine_tuning})
    document = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()
