"""How jobs, their events, dry runs and data sets look as JSON."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from server.api.estimate import Estimate
from server.api.submission import Prepared
from server.jobs.jobs import Event, Job
from server.jobs.merge_spec import Spec
from server.training.datasets import Dataset
from server.training.encoding import preview
from server.training.job_data import JobData

_PREVIEWED_ROWS = 3
_PREVIEWED_TOKENS = 200

_NO_PROGRESS = {"step": 0, "epoch": 0.0, "tokens": 0, "tokens_per_second": None, "eta_seconds": None}
_NO_METRICS = {"train_loss": None, "eval_loss": None, "base_eval_loss": None}
_ROW_FACTS = {
    "digest": "digest",
    "rows": "num_rows",
    "tokens": "num_tokens",
    "trained_tokens": "num_targets",
    "truncated": "num_truncated",
    "validation_digest": "validation_digest",
    "validation_rows": "num_validation_rows",
    "validation_truncated": "num_validation_truncated",
    "overlap": "num_overlapping",
}
"""The report's names, and ours."""


def job_document(job: Job) -> dict[str, object]:
    """A job as GET /train/{id} has it."""
    return {
        "id": job.id,
        "project": job.project,
        "key": job.key_id,
        "kind": job.kind,
        "name": job.name,
        "status": job.status.value,
        "position": job.position,
        "pausing": job.is_pausing,
        "progress": {**_NO_PROGRESS, "total_steps": job.data.get("total_steps"), **job.progress},
        "metrics": {**_NO_METRICS, **job.metrics},
        "adapter": job.adapter,
        "error": job.error,
        "created_at": job.created_at.isoformat(),
        "started_at": None if job.started_at is None else job.started_at.isoformat(),
        "finished_at": None if job.finished_at is None else job.finished_at.isoformat(),
        "files_removed_at": None if job.files_removed_at is None else job.files_removed_at.isoformat(),
        "config": _config(job.spec, job.data.get("source")),
        "data": _rows(job.data) if job.kind == "train" else None,
        "attempt": job.attempt,
    }


def dry_run_document(
    prepared: Prepared, estimate: Estimate, decode: Callable[[list[int]], str]
) -> dict[str, object]:
    """What a job would be; `decode` is the tokenizer's. Blocks for a moment."""
    return {
        "dry_run": True,
        "name": prepared.spec.name,
        "data": _rows(prepared.facts),
        "steps": prepared.total_steps,
        "estimate": asdict(estimate),
        "preview": _preview(prepared.data, decode),
        "config": _config(prepared.spec, prepared.source),
        "warnings": list(prepared.warnings),
    }


def dataset_document(dataset: Dataset) -> dict[str, object]:
    """A data set as it is listed."""
    return {
        "id": dataset.id,
        "filename": dataset.filename,
        "format": dataset.format,
        "rows": dataset.num_rows,
        "bytes": dataset.bytes,
        "kinds": dict(dataset.kinds),
        "digest": dataset.digest,
        "created_at": dataset.created_at.isoformat(),
    }


def event_document(event: Event) -> dict[str, object]:
    """One of the job's events."""
    return {
        "seq": event.seq,
        "at": event.at.isoformat(),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }


def _config(spec: Spec, source: object) -> dict[str, object]:
    """The body with its defaults; rows that were sent with it are left out."""
    where = source if isinstance(source, Mapping) else {}
    return {**spec.to_document(), **where}


def _rows(facts: Mapping[str, object]) -> dict[str, object]:
    return {name: facts.get(stored) for name, stored in _ROW_FACTS.items()}


def _preview(data: JobData, decode: Callable[[list[int]], str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, example in enumerate(data.train[:_PREVIEWED_ROWS]):
        tokens = preview(example, decode)
        shown = [{"text": text, "trained": is_target} for text, is_target in tokens[:_PREVIEWED_TOKENS]]
        rows.append({"row": number, "tokens": shown, "more": len(tokens) - len(shown)})
    return rows
