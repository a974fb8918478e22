"""Turn the body of POST /train into a queued job.

`choose_rows` finds the rows to train on and to hold out, `build_spec` fills in defaults and resolves names, and
`Submissions` tokenizes the rows, stores them and queues the job. Everything that POST /train refuses is refused
here, before anything is stored. A job is queued only once its files are on disk. The functions here block, on disk
I/O or on the tokenizer, so call them in a thread.
"""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapters import recorded
from adapters.catalog.catalog import Part
from adapters.errors import FieldError, InDoubt, InvalidInput, NotFound
from adapters.expression import Term, parse
from adapters.library import Library, Pinned
from adapters.names import alias_fault
from adapters.peft.files import PeftAdapter
from adapters.storage.durable import new_directory
from server.api.tracing import facts
from server.api.train_schemas import MAX_STEPS, MAX_TRAINED_RANK, LoraBody, TrainBody
from server.decisions.questions import MAX_QUESTIONS, Question, name_fault, parse_question
from server.decisions.stored import StoredDecisions
from server.errors import Unavailable
from server.jobs.files import TRACEPARENT_NAME, JobFiles, size_of
from server.jobs.jobs import FINE_TUNING, Job, Jobs
from server.jobs.room import training_bytes
from server.jobs.specs import Spec
from server.system.messages import plural
from server.training.encoding import RowEncoder, texts_of
from server.training.files import RowSources
from server.training.formats import RowFormat
from server.training.job_data import DataFacts, JobData, TestRows
from server.training.rows import (
    CanonicalRows,
    DecisionRow,
    EmptyAnswer,
    Row,
    RowNotes,
    default_share,
    hold_out,
    overlap,
    parse_row,
    set_aside,
)
from server.training.spec import (
    COMPARE_WITH_LATEST,
    DECISION_METRICS,
    LEARNING_RATES,
    JobSpec,
    LoraSpec,
    Metric,
    TrainingSpec,
    default_alpha,
)
from server.training.verdicts import MIN_HELD_OUT

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

Room = Callable[[int], AbstractContextManager[None]]
"""Reserves bytes for a new job until the context ends, or raises an error. 0 bytes only check for room."""


def unlimited(num_bytes: int) -> AbstractContextManager[None]:
    """Return a context that reserves nothing."""
    return nullcontext()


MAX_FAULTS = 20
"""The most faults of rows that one answer lists."""
MAX_STORED_BYTES = 64 << 10
"""The most bytes of the questions that a version stores."""
MAX_PARENT_RANK = 2 * MAX_TRAINED_RANK
"""The highest rank of an adapter to continue from. With the `init` pissa or olora, a job publishes an adapter with
twice the rank that it trains, and another job can continue from that adapter."""


@dataclass(frozen=True)
class JobRows:
    """The rows of a job.

    `name` is the body's field that `rows` came from. `validation_name` is the field that the held-out rows came
    from, or None if the held-out rows are a share of `rows`; `test_name` is the same for the test rows.
    """

    rows: CanonicalRows = field(repr=False)
    train: CanonicalRows = field(repr=False)
    validation: CanonicalRows = field(repr=False)
    test: CanonicalRows = field(repr=False)
    name: str
    validation_name: str | None
    test_name: str | None
    source: Mapping[str, object]  # the fields `dataset`, `validation` and `test`, without rows
    used: frozenset[str]  # ids of data sets and files
    mapping: RowFormat | None  # as in `RowNotes`
    warnings: tuple[str, ...]  # about ignored fields and other trainers' formats
    questions: Mapping[str, Question] = field(default_factory=dict)  # of decisions, by name


def choose_rows(body: TrainBody, sources: RowSources) -> JobRows:
    """Return the rows to train on, at least one, the rows to hold out, and the test rows.

    Raise InvalidInput if rows have faults, or NotFound if a data set doesn't exist.
    """
    notes = RowNotes()
    if body.dataset is not None:
        name, rows = "dataset", _stored(sources, body.dataset, "dataset", notes)
    else:
        assert body.data is not None, "`build_spec` has checked that one of the two is given"
        name, rows = "data", _sent(body.data, "data", notes)
    share = default_share(len(rows)) if body.validation is None else body.validation
    train = rows
    if isinstance(body.test, str | list):
        test, test_name = _held_out(sources, body.test, "test", notes), "test"
    else:
        train, test = set_aside(rows, body.test, share if isinstance(share, float) else 0.0)
        test_name = None
    if isinstance(share, str | list):
        validation, validation_name = _held_out(sources, share, "validation", notes), "validation"
    else:
        train, validation = hold_out(train, share)
        validation_name = None
    held_out = {"validation": share, "test": body.test}
    source = {name: "rows" if isinstance(value, list) else value for name, value in held_out.items()}
    return JobRows(
        rows=rows,
        train=train,
        validation=validation,
        test=test,
        name=name,
        validation_name=validation_name,
        test_name=test_name,
        source={"dataset": body.dataset, **source},
        used=frozenset(one for one in (body.dataset, share, body.test) if isinstance(one, str)),
        mapping=notes.mapping,
        warnings=tuple(notes.warnings()),
        questions=named_questions(body.questions or {}),
    )


def named_questions(given: Mapping[str, object]) -> dict[str, Question]:
    """Parse the field `questions`, which has questions by name. Raise InvalidInput if one is invalid."""
    if len(given) > MAX_QUESTIONS:
        raise InvalidInput.of("questions", f"are {len(given)}, and may be {MAX_QUESTIONS}")
    questions = {name: parse_question(value, ("questions", name)) for name, value in given.items()}
    for name, question in questions.items():
        if fault := name_fault(name):
            raise InvalidInput.of("questions", fault)
        if question.name not in (None, name):
            raise InvalidInput([FieldError(("questions", name, "name"), f"contradicts {name}: leave it out")])
    return {name: dataclasses.replace(question, name=name) for name, question in questions.items()}


def _held_out(sources: RowSources, given: str | list[object], name: str, notes: RowNotes) -> CanonicalRows:
    """Return the rows of the field `name`: those of a data set, or those that it has itself."""
    return _stored(sources, given, name, notes) if isinstance(given, str) else _sent(given, name, notes)


def _stored(sources: RowSources, source_id: str, name: str, notes: RowNotes) -> CanonicalRows:
    try:
        return sources.rows(source_id, notes)
    except NotFound as error:
        raise NotFound(f"{name}: {error}", hint=error.hint) from None


def _sent(values: Sequence[object], name: str, notes: RowNotes) -> CanonicalRows:
    rows: list[Row] = []
    faults: list[FieldError] = []
    for number, value in enumerate(values):
        try:
            rows.append(parse_row(value, notes))
        except EmptyAnswer:
            continue
        except InvalidInput as error:
            faults += _placed(error, name, number)
            if len(faults) >= MAX_FAULTS:
                more = FieldError((name,), "later rows may have faults, too")
                raise InvalidInput([*faults[:MAX_FAULTS], more]) from None
    if faults:
        raise InvalidInput(faults)
    if not rows:
        raise InvalidInput.of(name, "has no rows but ones with an empty answer")
    return CanonicalRows.of(rows)


def _placed(error: InvalidInput, name: str, number: int) -> Iterator[FieldError]:
    """Yield the faults of row `number`, located in the body's field `name`."""
    for fault in error.errors:
        if fault.loc == ("row",):  # the row isn't an object, so no field is at fault
            yield FieldError((name,), f"row {number} {fault.message}")
        else:
            yield FieldError((name, number, *fault.loc), fault.message)


def parent_terms(body: TrainBody, base_name: str) -> tuple[Term, ...]:
    """Return the adapter to continue from, as the only term, or () if training starts from the base.

    Raise InvalidInput if `start_from` isn't a single adapter without a weight.
    """
    text = body.start_from
    if text is None or text == base_name:
        return ()
    terms = parse(text, "start_from")
    if len(terms) > 1 or any(term.weight != 1 for term in terms):
        raise InvalidInput.of("start_from", "must name one adapter, without a weight")
    return terms


def build_spec(body: TrainBody, library: Library, pinned: Pinned, max_length: int) -> JobSpec:
    """Return the job's specification. If the body gives no number of epochs, `_with_epochs` chooses it later.

    `pinned` has the adapter to continue from (the parent), if any. `max_length` is the base's limit, in tokens.
    Raise InvalidInput, which lists every invalid field. Raise NotFound or CorruptAdapter if the parent can't be
    read.
    """
    faults = [*_name_faults(body.name, library), *_faults(body, max_length)]
    lora = _lora(body.lora)
    parent = pinned.parts[0] if pinned.parts else None
    if any(part != parent or part.weight != 1 for part in pinned.parts):
        message = "is a composition: merge it into an adapter first, by a method of POST /compositions"
        faults.append(FieldError(("start_from",), message))
    elif parent is not None:
        adapter = library.read(parent.digest)
        if (rank := adapter.weights.max_rank) > MAX_PARENT_RANK:
            message = (
                f"has rank {rank}, and training can continue from rank {MAX_PARENT_RANK} at most: merge it into "
                "an adapter of smaller rank first, by POST /compositions with method svd and a rank"
            )
            faults.append(FieldError(("start_from",), message))
        asked, lora = lora, _shaped(lora, library, parent, adapter)
        faults += _contradictions(asked, lora, body.lora.model_dump(exclude_unset=True, exclude_none=True))
    if faults:
        raise InvalidInput(faults)
    rate = body.training.learning_rate
    training = TrainingSpec(
        **body.training.model_dump(exclude={"learning_rate"}, exclude_none=True),
        learning_rate=LEARNING_RATES[body.method] if rate is None else rate,
    )
    return JobSpec(
        name=body.name,
        method=body.method,
        lora=lora,
        training=training,
        start_from=None if parent is None else f"{parent.name}@{parent.version}",
        start_from_digest=None if parent is None else parent.digest,
        publish_if=body.publish_if,
        publish_metric=body.publish_metric,
        alias=body.alias,
        description=body.description,
    )


def _name_faults(name: str, library: Library) -> Sequence[FieldError]:
    try:
        library.check_name(name)
    except InvalidInput as error:
        return error.errors
    return ()


def _faults(body: TrainBody, max_length: int) -> Iterator[FieldError]:
    training = body.training
    if (body.data is None) == (body.dataset is None):
        for name in ("data", "dataset"):
            yield FieldError((name,), "give exactly one of data and dataset")
    if training.max_length > max_length:
        yield FieldError(("training", "max_length"), f"the base reads at most {max_length} tokens")
    if training.early_stopping_patience is not None and training.eval_steps is None:
        message = "counts evaluations, so it needs training.eval_steps"
        yield FieldError(("training", "early_stopping_patience"), message)
    if body.alias is not None and (fault := alias_fault(body.alias)):
        yield FieldError(("alias",), fault)
    if "\0" in body.description:
        yield FieldError(("description",), "must not have NUL characters")
    if body.method == "full":
        if body.lora.model_fields_set:
            yield FieldError(("lora",), "full fine-tuning trains no adapter: leave it out, or set method to lora")
        if body.publish_if != "always":
            message = "full fine-tuning publishes no version: leave it out"
            yield FieldError(("publish_if",), message)
        if body.alias is not None:
            yield FieldError(("alias",), "full fine-tuning publishes no version: leave it out")
        if body.start_from is not None:
            yield FieldError(("start_from",), "full fine-tuning can't start from an adapter: leave it out")


def _lora(body: LoraBody) -> LoraSpec:
    """Return the adapter's shape with the default alpha filled in."""
    alpha = default_alpha(use_rslora=body.use_rslora) if body.alpha is None else body.alpha
    return LoraSpec(**body.model_dump(exclude={"alpha"}), alpha=alpha)


def _shaped(lora: LoraSpec, library: Library, parent: Part, stored: PeftAdapter) -> LoraSpec:
    """Return `lora` with the parent's shape, which training keeps. Raise NotFound if the parent was deleted."""
    version = library.version(parent.name, parent.version)
    config = recorded.config_of(version, stored, library.shape.num_layers)
    return dataclasses.replace(
        lora,
        rank=config.rank,
        alpha=float(config.alpha),
        target_modules=stored.weights.target_modules,
        use_rslora=config.use_rslora,
    )


def _contradictions(asked: LoraSpec, shaped: LoraSpec, given: Collection[str]) -> Iterator[FieldError]:
    """Yield a fault for each field in `given` in which `asked` differs from `shaped`, the parent's shape.

    The field `init` is always a fault, because the parent's weights are kept.
    """
    if "init" in given:
        yield FieldError(("lora", "init"), "is for new adapters, not with start_from: leave it out")
    for name in given:
        if (value := getattr(shaped, name)) != getattr(asked, name):
            kept = ", ".join(value) if isinstance(value, tuple) else value
            yield FieldError(("lora", name), f"is taken from start_from ({kept}): leave it out")


@dataclass(frozen=True)
class Prepared:
    """A job that has been checked and tokenized, and is ready to be queued."""

    spec: JobSpec
    data: JobData
    rows: JobRows
    are_facts: bool  # as in `EncodedRows`, of the training rows
    warnings: tuple[str, ...]  # about the parent and the rows

    @property
    def total_steps(self) -> int:
        return self.spec.training.total_steps(self.data.facts.num_rows)

    @property
    def facts(self) -> Mapping[str, object]:
        """Facts about the rows, for the job's record."""
        return asdict(self.data.facts) | {"total_steps": self.total_steps, "source": dict(self.rows.source)}


@dataclass(frozen=True)
class _Encoded:
    """A job's encoded rows, and warnings about them. `are_facts` is that of the training rows' `EncodedRows`."""

    data: JobData
    are_facts: bool
    warnings: Sequence[str]


@dataclass(frozen=True)
class Submissions:
    """A submitter of training jobs for one base and one project.

    `max_length` is the base's limit, in tokens. `num_parameters` is the number of the base's parameters.
    """

    home: Path
    jobs: Jobs
    sources: RowSources
    library: Library
    encoder: RowEncoder
    max_length: int
    base_digest: str
    num_parameters: int
    bucket: "Bucket | None" = None

    @property
    def _files(self) -> JobFiles:
        return JobFiles(self.home, self.bucket)

    def submit(
        self,
        body: TrainBody,
        idempotency_key: str | None,
        fine_tuning: Mapping[str, object] | None = None,
        room: Room = unlimited,
    ) -> Job:
        """Queue a job, or return the job that was queued with the same idempotency key before.

        `room` is asked before a new job is prepared, and for what it may store before it is queued. `fine_tuning`
        is stored with the job's data under FINE_TUNING. Raise InvalidInput if the body or the rows are invalid,
        NotFound if the rows or the parent don't exist, Conflict if the name is a composition's, or if the parent
        or the latest version to compare with doesn't fit the base's shapes, QueueFull if too many jobs haven't
        ended, or OSError if the disk fails.
        """
        digest = _digest(body, fine_tuning)
        kept = {} if fine_tuning is None else {FINE_TUNING: dict(fine_tuning)}
        if (first := self.jobs.repeated(idempotency_key, digest)) is not None:
            return first
        if body.method != "full":
            self.library.catalog.check_limits(body.name)
        with room(0):
            pass
        # `prepared` pins the parent's bytes until the job itself pins them
        with self.prepared(body) as prepared:
            return self.queue(
                prepared.spec,
                prepared.data.save,
                data={**prepared.facts, **kept},
                used=prepared.rows.used,
                idempotency_key=idempotency_key,
                body_digest=digest,
                warnings=prepared.warnings,
                room=room,
                result_bytes=lambda _: training_bytes(prepared.spec, self.library.shape, self.num_parameters),
            )

    def queue(
        self,
        spec: Spec,
        save: Callable[[Path], None],
        *,
        data: Mapping[str, object],
        used: Collection[str],
        idempotency_key: str | None,
        body_digest: str,
        warnings: Sequence[str],
        room: Room,
        result_bytes: Callable[[int], int],
    ) -> Job:
        """Store a job's files and queue it. `save` writes the files into a directory.

        `result_bytes` returns the most bytes that the job may store, given the size of its files. The adapters
        that the job reads must be pinned. The other arguments, the result and the errors are those of
        `Jobs.submit`. Raise OSError if the disk fails.
        """
        job_id = f"job-{secrets.token_hex(8)}"
        request = facts.get()
        try:
            with ExitStack() as reservation:
                with new_directory(self._files.directory(job_id)) as unfinished:
                    save(unfinished)
                    if request is not None and request.span is not None:
                        (unfinished / TRACEPARENT_NAME).write_text(request.span.traceparent, encoding="ascii")
                    row_bytes = size_of(unfinished)
                    num_bytes = row_bytes + result_bytes(row_bytes)
                    reservation.enter_context(room(num_bytes))
                self._files.keep(job_id)
                job = self.jobs.submit(
                    spec,
                    job_id=job_id,
                    data=data,
                    used=used,
                    idempotency_key=idempotency_key,
                    body_digest=body_digest,
                    warnings=warnings,
                    num_bytes=num_bytes,
                )
        except InDoubt:  # the job may be queued; if it isn't, a sweep removes the files
            raise
        except BaseException:
            self._drop(job_id)
            raise
        if job.id != job_id:  # another request with the same key came first
            self._drop(job_id)
        if request is not None:
            request.job_id = job.id
        return job

    def _drop(self, job_id: str) -> None:
        with suppress(Unavailable):  # a sweep removes old files that belong to no job
            self._files.remove(job_id)

    @contextmanager
    def prepared(self, body: TrainBody, max_bytes: int | None = None) -> Iterator[Prepared]:
        """Check and tokenize a job, and yield it without storing or queuing it. Raise the same errors as `submit`.

        The parent stays pinned until the context ends. If `max_bytes` is given, only the first rows are encoded:
        up to about `max_bytes` of text from the training rows, and as much from the held-out rows. Token counts
        are then scaled to all rows, and a warning says so.
        """
        terms = parent_terms(body, self.library.base_name)
        pinned = self.library.pin(terms) if terms else Pinned()
        try:
            spec = build_spec(body, self.library, pinned, self.max_length)
            rows = choose_rows(body, self.sources)
            _check_rows(spec, rows)
            if spec.publish_if in COMPARE_WITH_LATEST:  # the latest version is evaluated, too, so it must fit
                with suppress(NotFound):
                    self.library.pin([Term(spec.name)], "name").release()
            encoded = self._encode(spec.training, rows, max_bytes)
            _check_publish_metric(spec, encoded.data)
            few = _few_rows_warning(spec, encoded.data)
            yield Prepared(
                spec=_with_epochs(spec, body, encoded.data.facts.num_rows),
                data=encoded.data,
                rows=rows,
                are_facts=encoded.are_facts,
                warnings=(*pinned.warnings, *rows.warnings, *encoded.warnings, *few),
            )
        finally:
            pinned.release()

    def _encode(self, training: TrainingSpec, rows: JobRows, max_bytes: int | None) -> _Encoded:
        """Return the encoded rows, and warnings about them.

        Raise InvalidInput if all training, held-out or test rows are dropped because they are too long.
        """
        length, overlong = training.max_length, training.overlong
        as_served = self.encoder.asking(rows.questions)
        shuffled = self.encoder.asking(rows.questions, shuffled_by=training.seed)
        first, held_out, tests = (_first(of, max_bytes) for of in (rows.train, rows.validation, rows.test))
        try:
            train = shuffled.encode_all(first, length, overlong, (rows.name,))
            loc = (rows.validation_name or rows.name,)
            validation = as_served.encode_all(held_out, length, overlong, loc)
            test = as_served.encode_all(tests, length, overlong, (rows.test_name or rows.name,))
        except InvalidInput:
            # raise faults with the numbers in `rows`
            if rows.validation_name is None or (rows.test and rows.test_name is None):
                as_served.encode_all(_first(rows.rows, max_bytes), length, overlong, (rows.name,))
            raise
        parts = (
            (rows.name, "row", first, train),
            ("validation", "held-out row", held_out, validation),
            ("test", "test row", tests, test),
        )
        for at, what, given, encoded in parts:
            if given and not encoded.examples:
                if max_bytes is not None:  # later rows may fit
                    return self._encode(training, rows, None)
                fault = f"each {what} is dropped as longer than training.max_length ({length} tokens): raise it"
                raise InvalidInput.of(at, fault)
        scale = len(rows.train) / len(first)
        held_out_scale = len(rows.validation) / max(len(held_out), 1)
        test_scale = len(rows.test) / max(len(tests), 1)
        long, held_out_long = train.long.scaled(scale), validation.long.scaled(held_out_scale)
        all_long = long + held_out_long + test.long.scaled(test_scale)
        facts = DataFacts(
            digest=rows.train.digest(),
            num_rows=round(len(train.examples) * scale),
            num_tokens=round(train.examples.num_tokens * scale),
            num_targets=round(train.examples.num_targets * scale),
            num_truncated=long.num_truncated,
            validation_digest=rows.validation.digest() if rows.validation else None,
            num_validation_rows=round(len(validation.examples) * held_out_scale),
            num_validation_truncated=held_out_long.num_truncated,
            num_overlapping=overlap(rows.validation, rows.train),
            test_digest=rows.test.digest() if rows.test else None,
            num_test_rows=round(len(test.examples) * test_scale),
            num_test_overlapping=overlap(rows.test, rows.train, rows.validation),
            num_split=all_long.num_split,
            num_dropped=all_long.num_dropped,
            num_lost_tokens=all_long.num_lost_tokens,
            kinds=rows.train.kinds(),
        )
        warnings = [*train.warnings, *all_long.warnings(length)]
        stored = _stored_decisions(rows, as_served)
        data = JobData(
            train=train.examples,
            validation=validation.examples if held_out else None,
            references=as_served.references(held_out, max_length=length),
            facts=facts,
            base_digest=self.base_digest,
            trained_references=as_served.trained_references(first, train.examples.num_tokens, length),
            decisions=stored,
            asked=as_served.asked(held_out),
            options={one.digest: tuple(as_served.decisions.options(one)) for one in stored.questions}
            if stored is not None
            else {},
            samples=as_served.samples(held_out, length),
            test=TestRows(test.examples, as_served.references(tests, max_length=length), as_served.asked(tests))
            if tests
            else None,
        )
        num_encoded = len(first) + len(held_out) + len(tests)
        num_rows = len(rows.train) + len(rows.validation) + len(rows.test)
        if num_encoded == num_rows:
            return _Encoded(data, train.are_facts, warnings)
        sampled = f"only {num_encoded:,} of {num_rows:,} rows were tokenized: counts of tokens are estimates"
        return _Encoded(data, train.are_facts, [*warnings, sampled])


def _stored_decisions(rows: JobRows, encoder: RowEncoder) -> StoredDecisions | None:
    """Return the questions of the training rows, or None if there are no decisions. Unnamed ones get names."""
    found: dict[str, Question] = {}
    for row in rows.train if "decision" in rows.train.kinds() else ():
        if isinstance(row, DecisionRow):
            question = encoder.question(row)
            found.setdefault(question.digest, question)
    if not found:
        return None
    if len(found) > MAX_QUESTIONS:
        raise InvalidInput.of(rows.name, f"has {len(found)} different questions, more than {MAX_QUESTIONS}")
    named: dict[str, Question] = {}
    for number, question in enumerate(found.values(), 1):
        name = question.name or f"question-{number}"
        if name in named:
            raise InvalidInput.of(rows.name, f"has two different questions of the name {name}")
        named[name] = dataclasses.replace(question, name=name)
    stored = StoredDecisions(tuple(named.values()))
    if len(json.dumps(stored.document())) > MAX_STORED_BYTES:
        raise InvalidInput.of("questions", f"are longer than {MAX_STORED_BYTES // 1024} KiB together")
    return stored


def _first(rows: CanonicalRows, max_bytes: int | None) -> CanonicalRows:
    """Return the first rows, up to `max_bytes` of text but at least one row; all rows if `max_bytes` is None."""
    if max_bytes is not None:
        num_bytes = 0
        for number, row in enumerate(rows):
            num_bytes += sum(len(text.encode()) for text in texts_of(row))
            if num_bytes > max_bytes and number:
                return rows[:number]
    return rows


def _check_rows(spec: JobSpec, rows: JobRows) -> None:
    """Raise InvalidInput if fields need held-out rows and there are none."""
    faults = []
    training = spec.training
    if not rows.validation:
        needs = "needs held-out rows: set validation"
        if spec.publish_if != "always":
            faults.append(FieldError(("publish_if",), needs))
        if training.eval_steps is not None:
            faults.append(FieldError(("training", "eval_steps"), needs))
    if faults:
        raise InvalidInput(faults)


def _with_epochs(spec: JobSpec, body: TrainBody, num_rows: int) -> JobSpec:
    """Return the specification. If the body gives no number of epochs, derive it from the number of rows.

    Raise InvalidInput if the epochs have too many steps.
    """
    if body.training.epochs is None:
        spec = dataclasses.replace(spec, training=spec.training.with_epochs(num_rows))
    if (steps := spec.training.total_steps(num_rows)) > MAX_STEPS:
        raise InvalidInput(
            [FieldError(("training", "epochs"), f"come to {steps} steps; there may be {MAX_STEPS}")]
        )
    return spec


def _check_publish_metric(spec: JobSpec, data: JobData) -> None:
    """Raise InvalidInput if `publish_metric` measures completions or decisions, and the job's rows have none."""
    if spec.publish_metric in DECISION_METRICS and data.decisions is None:
        raise InvalidInput.of(
            "publish_metric",
            f"{spec.publish_metric} needs rows of decisions (input and answer): set it to loss or exact_match",
        )
    if spec.publish_metric == "exact_match" and not (data.references or data.trained_references):
        raise InvalidInput.of(
            "publish_metric", "exact_match needs rows with completions that fit max_length: set it to loss"
        )


def _few_rows_warning(spec: JobSpec, data: JobData) -> Iterator[str]:
    """Yield warnings about settings that need more distinct held-out rows than there are."""
    has_completions = bool(data.references or data.trained_references)
    if spec.publish_if != "always" and not has_completions and (number := _num_distinct(data)) < MIN_HELD_OUT:
        result = "holds no version back" if spec.publish_if == "not_worse" else "lets no version pass"
        yield (
            f"publish_if {spec.publish_if} {result}: a verdict takes {MIN_HELD_OUT} held-out rows, or rows with "
            f"completions; the job has {plural(number, 'distinct held-out row')} and no completions to measure"
        )
    if spec.training.eval_steps is None or data.validation is None:
        return
    number = _num_distinct(data, spec.publish_metric)
    if number < MIN_HELD_OUT:
        rows = plural(number, "distinct row") + _ROWS_OF[spec.publish_metric]
        yield (
            f"only {rows} held out: below {MIN_HELD_OUT}, evaluations choose no step and stop "
            "nothing, so the last step's weights are kept"
        )


_ROWS_OF: Mapping[Metric, str] = {
    "loss": "",
    "exact_match": " with completions",
    "accuracy": " of decisions",
    "brier": " of decisions",
}


def _num_distinct(data: JobData, metric: Metric = "loss") -> int:
    """Return the number of distinct held-out rows that have what the metric measures."""
    if data.validation is None:
        return 0
    rows: Iterable[object] = data.validation.row_keys()
    if metric == "exact_match":
        rows = data.references
    elif metric in DECISION_METRICS:
        rows = [one for one in data.asked if one.question in data.options]
    found = len(set(rows))
    return round(found * data.facts.num_validation_rows / len(data.validation))  # the rows may be a sample


def _digest(body: TrainBody, fine_tuning: Mapping[str, object] | None) -> str:
    """Return a digest that is equal for bodies with the same meaning."""
    fields = body.model_dump(mode="json") | ({} if fine_tuning is None else {FINE_TUNING: fine_tuning})
    if not body.test:  # so that it equals the digest of a release without the field
        del fields["test"]
    document = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()
