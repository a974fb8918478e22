"""Answers under /train and /datasets: jobs, events, dry runs and data sets."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Literal, Self

from pydantic import ConfigDict, Field

from server.api.estimate import Estimate
from server.api.schemas import Answer, Timestamp
from server.api.submission import JobRows, Prepared
from server.jobs.jobs import Job
from server.jobs.specs import Spec
from server.jobs.tables import JobKind
from server.training.encoding import FACT_SHARE, FACT_TOKENS, preview, texts_of
from server.training.formats import RowFormat
from server.training.job_data import JobData
from server.training.rows import CanonicalRows, question_of

_PREVIEWED_ROWS = 3
_PREVIEWED_TOKENS = 200
_SAMPLES = 5  # of the training rows, and as many of the held-out rows
_SAMPLED_ROWS = 50  # the first rows, among which samples are chosen
_SAMPLED_CHARACTERS = 4000  # the most of a sample
_FACTS = (
    "the rows look like facts (completions are short and nearly all distinct): a held-out fact can't be known, so "
    "look at recall on trained rows instead of the held-out loss"
)

_NO_PROGRESS = {"step": 0, "epoch": 0.0, "tokens": 0, "tokens_per_second": None, "eta_seconds": None}
_NO_METRICS = {"train_loss": None, "eval_loss": None, "base_eval_loss": None}


class Progress(Answer):
    step: int
    total_steps: int
    epoch: float
    tokens: int = Field(description="non-padding inputs of training steps so far")
    tokens_per_second: float | None
    eta_seconds: float | None


class JobMetrics(Answer):
    model_config = ConfigDict(extra="allow")  # a job that succeeded has more metrics

    train_loss: float | None = Field(description="of the last step, in nats per trained token")
    eval_loss: float | None = Field(description="on the held-out rows")
    base_eval_loss: float | None = Field(description="of the unchanged base, on the same rows")


class PublishedAdapter(Answer):
    name: str
    version: int
    digest: str
    moves_latest: bool | None = Field(
        None, description="whether `latest` moved to it: not if it is worse; null for a job of an older release"
    )


class RowCounts(Answer):
    """Counts of a job's tokenized rows."""

    # the aliases are the names of the fields in `server.training.job_data.DataFacts`

    digest: str
    rows: int = Field(validation_alias="num_rows")
    tokens: int = Field(validation_alias="num_tokens")
    trained_tokens: int = Field(validation_alias="num_targets")
    truncated: int = Field(validation_alias="num_truncated")
    validation_digest: str | None
    validation_rows: int = Field(validation_alias="num_validation_rows")
    validation_truncated: int = Field(validation_alias="num_validation_truncated")
    overlap: int = Field(
        validation_alias="num_overlapping", description="held-out rows that are also training rows"
    )
    test_digest: str | None = None
    test_rows: int = Field(0, validation_alias="num_test_rows")
    test_overlap: int = Field(
        0, validation_alias="num_test_overlapping", description="test rows that are also training or held-out rows"
    )
    split: int = Field(0, validation_alias="num_split", description="rows split into windows that count as rows")
    dropped: int = Field(0, validation_alias="num_dropped", description="rows too long for max_length")
    lost_tokens: int = Field(0, validation_alias="num_lost_tokens", description="of dropped and truncated rows")
    kinds: dict[str, int] = Field(
        default_factory=dict, description="number of training rows by kind: completion, messages, text"
    )


class JobAnswer(Answer):
    id: str
    project: str = Field(description="the owner; names in the answer are this project's")
    key: str | None = Field(description="id of the key that submitted the job; null if it needed none")
    kind: JobKind
    name: str
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    position: int | None = Field(
        description="place of a queued job in the order of turns, from 1: it counts its project's older queued "
        "jobs, and other projects' jobs that come first, running ones included; null unless it is queued"
    )
    pausing: bool = Field(description="a pause was requested, and the job is still running")
    progress: Progress
    metrics: JobMetrics
    adapter: PublishedAdapter | None
    error: str | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    files_removed_at: Timestamp | None = Field(
        description="when the job's files were removed, or null; its rows are removed as soon as it ends"
    )
    config: dict[str, object] = Field(description="the body with every default filled in")
    data: RowCounts | None = Field(description="null unless the job trains")
    attempt: int = Field(description="how many times a worker has started the job")

    @classmethod
    def of(cls, job: Job) -> Self:
        """Describe a job."""
        progress = {**_NO_PROGRESS, "total_steps": job.data.get("total_steps"), **job.progress}
        fields = {
            **vars(job),
            "key": job.key_id,
            "kind": job.kind,
            "pausing": job.is_pausing,
            "progress": progress,
            "metrics": {**_NO_METRICS, **job.metrics},
            "config": _config(job.spec, job.data.get("source")),
            "data": job.data if job.kind == "train" else None,
        }
        return cls(**fields)


class JobList(Answer):
    jobs: list[JobAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


class EventSample(Answer):
    """A held-out row's prompt, and greedy answers of at most 64 tokens. An answer is null if it can't be given."""

    prompt: str = Field(description="of a chat, its last turn before the answer")
    wanted: str = Field(description="the row's own answer")
    base: str | None = Field(description="of the unchanged base")
    tuned: str | None = Field(description="of the weights after the step")


class EventData(Answer):
    model_config = ConfigDict(extra="allow")  # metrics have the step's losses, learning rate and gradient norm

    step: int | None = Field(None, description="left out if the event is about no step")
    samples: list[EventSample] | None = Field(
        None,
        description="up to three, at evaluations and at the end of a training; left out of other events, and once "
        "the job's files are removed",
    )


class EventAnswer(Answer):
    seq: int
    at: Timestamp
    level: Literal["info", "warning", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: EventData


class PreviewToken(Answer):
    text: str
    trained: bool


class PreviewRow(Answer):
    row: int = Field(description="number among the training rows, from 0")
    tokens: list[PreviewToken]
    more: int = Field(description="number of further tokens, which aren't shown")


class SampleTurn(Answer):
    role: str
    content: str


class SampleRow(Answer):
    """A row as a prompt for /generate or /compare."""

    held_out: bool
    prompt: str | None = Field(default=None, description="left out for rows of messages")
    messages: list[SampleTurn] | None = Field(default=None, description="the turns before the answer")
    completion: str = Field(description="the row's own answer")


class DryRunAnswer(Answer):
    dry_run: Literal[True]
    name: str
    data: RowCounts
    steps: int = Field(description="optimizer steps in total")
    estimate: Estimate
    preview: list[PreviewRow]
    samples: list[SampleRow] = Field(description="some short rows with an answer, held-out rows first")
    config: dict[str, object]
    facts: bool = Field(
        description=f"completions are short (a median of at most {FACT_TOKENS} tokens), and at least "
        f"{FACT_SHARE:.0%} are distinct: held-out rows may be independent facts, which can't be known"
    )
    mapping: RowFormat | None = Field(description="the other trainers' format of the rows, or null")
    warnings: list[str] = Field(
        description="about start_from and the rows; a job has them as events, except the one about facts"
    )

    @classmethod
    def of(cls, prepared: Prepared, estimate: Estimate, decode: Callable[[list[int]], str]) -> Self:
        """Describe a job that could be queued. `decode` turns token ids into text."""
        has_held_out_facts = prepared.are_facts and prepared.data.validation is not None
        return cls(
            dry_run=True,
            name=prepared.spec.name,
            data=RowCounts.model_validate(prepared.facts),
            steps=prepared.total_steps,
            estimate=estimate,
            preview=_preview(prepared.data, decode),
            samples=_samples(prepared.rows),
            config=_config(prepared.spec, prepared.rows.source),
            facts=prepared.are_facts,
            mapping=prepared.rows.mapping,
            warnings=[*prepared.warnings, *([_FACTS] if has_held_out_facts else [])],
        )


class DatasetAnswer(Answer):
    id: str
    filename: str | None = Field(description="the first upload's name, or null if it isn't known")
    format: Literal["jsonl", "csv"]
    rows: int = Field(validation_alias="num_rows")
    bytes: int = Field(description="size of the first upload; quotas count the size of its rows as JSON")
    kinds: dict[str, int] = Field(description="number of rows by kind: completion, messages, text")
    digest: str
    created_at: Timestamp


class DatasetRow(Answer):
    index: int = Field(description="number in the data set, from 0")
    row: dict[str, object]
    tokens: int = Field(description="of its texts, without a chat template's")
    split: Literal["train", "validation"] = Field(description="where a job puts it")
    copies: int = Field(description="how many rows are equal, this one included")


class DatasetRows(Answer):
    rows: list[DatasetRow]
    count: int = Field(description="rows that match `q`; without it, all rows")
    duplicates: int = Field(description="rows of the data set that equal an earlier one")


class DatasetUploaded(DatasetAnswer):
    warnings: list[str] = Field(description="for example about fields that are not trained on")


class DatasetList(Answer):
    datasets: list[DatasetAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")


def _config(spec: Spec, source: object) -> dict[str, object]:
    """Return the body of the job's request, with all defaults and without rows.

    `source` has the body's fields `dataset`, `validation` and `test`, or is None if the job has no such fields.
    """
    where = source if isinstance(source, Mapping) else {}
    return {**spec.to_document(), **where}


def _preview(data: JobData, decode: Callable[[list[int]], str]) -> list[PreviewRow]:
    rows = []
    for number, example in enumerate(data.train[:_PREVIEWED_ROWS]):
        tokens = preview(example, decode)
        shown = [PreviewToken(text=text, trained=is_target) for text, is_target in tokens[:_PREVIEWED_TOKENS]]
        rows.append(PreviewRow(row=number, tokens=shown, more=len(tokens) - len(shown)))
    return rows


def _samples(rows: JobRows) -> list[SampleRow]:
    parts = ((True, rows.validation), (False, rows.train))
    return [sample for held_out, part in parts for sample in islice(_asked(part, held_out), _SAMPLES)]


def _asked(rows: CanonicalRows, held_out: bool) -> Iterator[SampleRow]:
    """Yield samples from the first 50 rows, without those that have too much text or no answer.

    `held_out` says whether these rows were held out of training.
    """
    for row in rows[:_SAMPLED_ROWS]:
        asked = question_of(row)
        if asked is None or sum(map(len, texts_of(row))) > _SAMPLED_CHARACTERS:
            continue
        question, completion = asked
        if isinstance(question, str):
            yield SampleRow(held_out=held_out, prompt=question, completion=completion)
        else:
            turns = [SampleTurn.model_validate(turn) for turn in question]
            yield SampleRow(held_out=held_out, messages=turns, completion=completion)
