"""Turn the body of POST /evaluate into a queued job.

Adapters are resolved to versions, rows are tokenized, and everything that can be refused is refused here. The
functions block, on disk I/O or on the tokenizer, so call them in a thread.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import ConfigDict, Field

from adapters.errors import FieldError, InvalidInput, NotFound
from adapters.expression import MAX_LENGTH, parse
from adapters.library import Library, Pinned
from adapters.lora import ModuleKey
from server.api.compare import faults_of_item
from server.api.schemas import Body
from server.api.submission import Room, Submissions, named_questions
from server.api.train_schemas import Questions
from server.decisions.questions import Question
from server.decisions.stored import StoredDecisions
from server.jobs.evaluate_spec import METRICS, Candidate, EvaluateSpec, Metric
from server.jobs.evaluation_data import EvaluatedRow, EvaluationData
from server.jobs.jobs import Job
from server.jobs.room import evaluation_bytes
from server.system.messages import plural
from server.training.encoding import Asked, Examples, Reference
from server.training.rows import CanonicalRows, CompletionRow, DecisionRow, MessagesRow, Row, RowNotes
from server.training.spec import MAX_MEASURED_RANK

MAX_ADAPTERS = 16
MAX_DATASETS = 16
DEFAULT_LIMIT, MAX_LIMIT = 200, 1000
_LIMIT = "the base's context"


class EvaluateBody(Body):
    """POST /evaluate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"adapters": ["base", "tweets@1", "tweets@2"], "datasets": ["ds-…"]},
                {"adapters": ["triage@1", "triage@2"], "datasets": ["ds-…"], "metrics": ["accuracy", "brier"]},
            ]
        }
    )

    adapters: list[Annotated[str, Field(max_length=MAX_LENGTH)]] = Field(
        min_length=1,
        max_length=MAX_ADAPTERS,
        description="adapter expressions, pinned to their current versions; the first is compared with each other",
    )
    datasets: list[Annotated[str, Field(max_length=64)]] = Field(
        min_length=1, max_length=MAX_DATASETS, description="ids from POST /datasets"
    )
    metrics: list[Metric] | None = Field(
        None, min_length=1, description="null: those that fit the rows; a row counts in the metrics that fit it"
    )
    limit: int = Field(
        DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="most rows of each data set: its first different ones"
    )
    questions: Questions | None = Field(
        None, description="the questions, by name, of rows that don't have them; null: those of the adapters"
    )


@dataclass(frozen=True)
class _Questions:
    """The questions that rows may name. `ambiguous` lists names whose questions differ between adapters."""

    by_name: Mapping[str, Question]
    ambiguous: Sequence[str] = ()


def submit_evaluation(
    submissions: Submissions, body: EvaluateBody, idempotency_key: str | None, room: Room
) -> Job:
    """Queue an evaluation, or return the job that was queued with the same idempotency key before.

    `room` is as in `Submissions.submit`. Raise InvalidInput if the body or rows are invalid,
    NotFound if an adapter or a data set doesn't exist, Conflict if an adapter doesn't fit the base's shapes,
    QueueFull if too many jobs haven't ended, or OSError if the disk fails.
    """
    digest = _digest(body)
    if (first := submissions.jobs.repeated(idempotency_key, digest)) is not None:
        return first
    with room(0):
        pass
    for name in ("adapters", "datasets", "metrics"):
        _refuse_repetition(name, getattr(body, name) or ())
    with ExitStack() as stack:  # the adapters' bytes stay pinned until the job itself pins them
        pinned = [_pinned(submissions.library, place, text, stack) for place, text in enumerate(body.adapters)]
        candidates = tuple(Candidate(text, one.parts) for text, one in zip(body.adapters, pinned, strict=True))
        stored = [_stored(submissions.library, candidate) for candidate in candidates]
        rows = _Rows(submissions, _known_questions(body, stored), body)
        data = EvaluationData(
            rows.rows,
            rows.examples,
            rows.options,
            rows.values,
            [_temperatures(candidate, found) for candidate, found in zip(candidates, stored, strict=True)],
            submissions.base_digest,
        )
        spec = EvaluateSpec(candidates, tuple(body.datasets), rows.metrics, body.limit)
        warnings = [*(text for one in pinned for text in one.warnings), *rows.warnings]
        return submissions.queue(
            spec,
            data.save,
            data={"total_steps": len(candidates)},
            used=body.datasets,
            idempotency_key=idempotency_key,
            body_digest=digest,
            warnings=list(dict.fromkeys(warnings)),
            room=room,
            result_bytes=lambda row_bytes: evaluation_bytes(row_bytes, len(candidates)),
        )


def _refuse_repetition(name: str, values: Sequence[str]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise InvalidInput.of(name, f"names {value[:MAX_LENGTH]} {plural(count, 'time')}: name it once")


def _pinned(library: Library, place: int, text: str, stack: ExitStack) -> Pinned:
    """Pin the versions of the expression at index `place` of the field `adapters`, until `stack` ends."""
    with faults_of_item(place):
        terms = () if text == library.base_name else parse(text)
        pinned = library.pin(terms) if terms else Pinned()
        stack.callback(pinned.release)
        ranks = Counter[ModuleKey]()
        for digest in {part.digest for part in pinned.parts}:
            ranks.update(library.ranks(digest))
        if (rank := max(ranks.values(), default=0)) > MAX_MEASURED_RANK:
            message = f"its adapters have rank {rank} together, and may have {MAX_MEASURED_RANK}"
            raise InvalidInput.of("adapter", message)
    return pinned


def _stored(library: Library, candidate: Candidate) -> list[StoredDecisions]:
    """Return what the candidate's versions store about decisions."""
    versions = (library.catalog.version(part.name, part.version) for part in candidate.parts)
    return [found for version in versions if (found := StoredDecisions.of(version.config)) is not None]


def _known_questions(body: EvaluateBody, stored: Sequence[Sequence[StoredDecisions]]) -> _Questions:
    """Return the body's questions if it has some, else those that the adapters store."""
    if body.questions:
        return _Questions(named_questions(body.questions))
    found: dict[str, Question] = {}
    ambiguous: list[str] = []
    for question in (question for of_one in stored for one in of_one for question in one.questions):
        name = question.name or ""
        if found.setdefault(name, question) != question:
            ambiguous.append(name)
    return _Questions(found, ambiguous)


def _temperatures(candidate: Candidate, stored: Sequence[StoredDecisions]) -> Mapping[str, float]:
    """Return the temperatures that /decide uses: those of a version by itself, and none for a blend."""
    is_one = len(candidate.parts) == 1 and candidate.parts[0].weight == 1
    return stored[0].temperatures if is_one and stored else {}


class _Rows:
    """The rows of all data sets, tokenized, and the metrics that fit them."""

    def __init__(self, submissions: Submissions, questions: _Questions, body: EvaluateBody) -> None:
        """Raise InvalidInput if a row is at fault, or if a metric of the body fits no row of a data set."""
        self.rows: list[EvaluatedRow] = []
        self.examples = Examples()
        self.options: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.values: dict[str, tuple[str | bool, ...]] = {}
        self.warnings: list[str] = []
        self._encoder = submissions.encoder.asking(questions.by_name)
        self._ambiguous = questions.ambiguous
        self._max_length = submissions.max_length
        fitting = set[Metric]()
        for place, dataset in enumerate(body.datasets):
            first = len(self.rows)
            notes = RowNotes()
            try:
                rows = submissions.sources.rows(dataset, notes)
            except NotFound as error:
                raise NotFound(f"datasets: item {place}: {error}", hint=error.hint) from None
            self._add(place, dataset, *_first_different(rows, body.limit))
            self.warnings += [f"{dataset}: {text}" for text in notes.warnings()]
            of_dataset = self._fitting(self.rows[first:])
            for number, metric in enumerate(body.metrics or ()):
                if metric not in of_dataset:
                    fits = ", ".join(name for name in METRICS if name in of_dataset)
                    message = f"item {number}: {metric} fits no row of {dataset}; metrics that fit: {fits}"
                    raise InvalidInput.of("metrics", message)
            fitting |= of_dataset
        self.metrics = tuple(body.metrics or [name for name in METRICS if name in fitting])

    def _add(self, place: int, dataset: str, numbers: Sequence[int], rows: CanonicalRows) -> None:
        """Add a data set's rows, which have these numbers in it. `place` is its index in the field `datasets`."""
        asked = [row.question for row in rows if isinstance(row, DecisionRow)]
        if self._ambiguous and any(question is None or question in self._ambiguous for question in asked):
            message = f"must be given: the adapters store different questions named {self._ambiguous[0]}"
            raise InvalidInput.of("questions", message)
        try:
            encoded = self._encoder.encode_all(rows, self._max_length, "auto", ("datasets", place))
        except InvalidInput as error:
            raise InvalidInput([_renumbered(fault, numbers) for fault in error.errors]) from None
        if not encoded.examples:
            message = f"item {place}: each row is longer than {_LIMIT}, {plural(self._max_length, 'token')}"
            raise InvalidInput.of("datasets", message)
        for example, source in zip(encoded.examples, encoded.examples.sources, strict=True):
            self.examples.append(example, len(self.rows) + source)
        texts = (*encoded.warnings, *encoded.long.warnings(self._max_length, _LIMIT))
        self.warnings += [f"{dataset}: {text}" for text in texts]
        for number, row in zip(numbers, rows, strict=True):
            reference = self._reference(row)
            schema = row.schema if reference and isinstance(row, CompletionRow | MessagesRow) else None
            self.rows.append(EvaluatedRow(dataset, number, reference, self._asked(row), schema))

    def _reference(self, row: Row) -> Reference | None:
        found = self._encoder.reference(row)
        return None if found is None or found.length >= self._max_length else found

    def _asked(self, row: Row) -> Asked | None:
        """Return a decision as tokens, or None if it is too long or the row isn't one."""
        if not isinstance(row, DecisionRow):
            return None
        question = self._encoder.question(row)
        if question.digest not in self.options:
            self.options[question.digest] = tuple(self._encoder.decisions.options(question))
            self.values[question.digest] = tuple(option.value for option in question.options)
        (asked,) = self._encoder.asked([row])
        longest = max(map(len, self.options[question.digest]))
        return asked if len(asked.prompt) + longest <= self._max_length else None

    def _fitting(self, rows: Sequence[EvaluatedRow]) -> set[Metric]:
        found: set[Metric] = {"loss", "token_accuracy"}
        if any(row.reference is not None for row in rows):
            found.add("exact_match")
        if any(row.schema is not None for row in rows):
            found.add("json_valid")
        if any(row.asked is not None for row in rows):
            found |= {"accuracy", "brier"}
        return found


def _first_different(rows: CanonicalRows, limit: int) -> tuple[list[int], CanonicalRows]:
    """Return the first `limit` different rows, with their numbers. Equal rows say nothing new."""
    numbers: dict[bytes, int] = {}
    for number, digest in enumerate(rows.digests()):
        if len(numbers) == limit:
            break
        numbers.setdefault(digest, number)
    chosen = set(numbers.values())
    return sorted(chosen), rows.chosen(number in chosen for number in range(len(rows)))


def _renumbered(fault: FieldError, numbers: Sequence[int]) -> FieldError:
    """Return the fault of a row with the row's number in its data set."""
    name, place, *rest = fault.loc
    if rest and isinstance(rest[0], int):
        rest[0] = numbers[rest[0]]
    return replace(fault, loc=(name, place, *rest))


def _digest(body: EvaluateBody) -> str:
    """Return a digest that is equal for requests with the same meaning, but unequal to any training request's."""
    document = json.dumps({"evaluate": body.model_dump(mode="json")}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()
