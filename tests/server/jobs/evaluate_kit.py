"""Evaluations of a tiny base without processes around them: submitted as POST /evaluate does, and run here."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

from adapters.names import Viewpoint
from server.api.evaluate_submission import EvaluateBody, submit_evaluation
from server.api.submission import Submissions, unlimited
from server.jobs.evaluate_job import EvaluationAttempt, StepFailed
from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.jobs import Job
from server.jobs.leases import LeaseLost
from server.jobs.reporter import Leave
from server.model.text.chat import PromptEncoder
from server.storage.home import Home
from server.storage.places import Storage
from server.training.encoding import RowEncoder
from server.training.files import RowSources
from tests.server.jobs.attempt_kit import Interruption, Killed, Reporter, Shop
from tests.server.jobs.merge_kit import library_of

COMPLETIONS: list[dict[str, object]] = [
    {"prompt": f"{number} ", "completion": text} for number, text in enumerate(["one", "two", "three", "four"] * 3)
]
QUESTION: dict[str, object] = {
    "type": "choice",
    "instructions": "",
    "name": "kind",
    "choices": [{"value": "a"}, {"value": "b"}, {"value": "bb"}],
}
DECISIONS: list[dict[str, object]] = [
    {"input": f"Row {number}", "answer": ("a", "b", "bb")[number % 3], "question": QUESTION} for number in range(9)
]


def submissions_of(shop: Shop) -> Submissions:
    base, sources = shop.base, RowSources.of(Storage(Home(shop.home), shop.bucket), "default")
    eos = base.config.eos_token_ids
    return Submissions(
        shop.home,
        shop.jobs.of(Viewpoint()),
        sources,
        library_of(shop.catalog, shop.store, base),
        RowEncoder(PromptEncoder(base.tokenizer), eos[0], eos),
        base.config.max_position_embeddings,
        base.digest,
        base.weights.num_parameters,
        shop.bucket,
    )


def dataset(shop: Shop, rows: Sequence[Mapping[str, object]]) -> str:
    """Store the rows, and return their id."""
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return submissions_of(shop).sources.datasets.put(BytesIO(content), "rows.jsonl").id


def submit(shop: Shop, **fields: object) -> Job:
    return submit_evaluation(submissions_of(shop), EvaluateBody.model_validate(fields), None, unlimited)


def attempt(shop: Shop, end_at: int | None = None, how: Interruption = "kill") -> Reporter:
    """Run one attempt at the next job, ended as its worker would end it. Raise what the attempt raises."""
    claim = shop.leases.claim("worker")
    assert claim is not None, "no job waits"
    shop.files.fetch(claim.job_id)
    spec = shop.jobs.get(claim.job_id).spec
    assert isinstance(spec, EvaluateSpec)
    reporter = Reporter(shop.leases, claim, end_at, how)
    library = library_of(shop.catalog, shop.store, shop.base)
    storage = Storage(Home(shop.home), shop.bucket)
    try:
        EvaluationAttempt(spec, claim, shop.leases, library, shop.base, reporter, storage).run()
    except Leave:
        shop.leases.release(claim)
    except (Killed, StepFailed) as error:
        with suppress(LeaseLost):
            shop.leases.crashed(claim, repr(error), max_delay=0.0)
    return reporter


def findings(shop: Shop, job: Job) -> dict[str, Any]:
    """Return the report of a job that succeeded."""
    report = shop.jobs.report(job.id)
    assert report is not None, shop.jobs.get(job.id)
    return {name: report[name] for name in ("results", "differences", "flips")}


def values(report: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return the metric's value by adapter."""
    return {one["adapter"]: one["value"] for one in report["results"] if one["metric"] == metric}
