"""The specification of a job of any kind, as it is stored with the job."""

from collections.abc import Mapping

from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.merge_spec import MergeSpec
from server.jobs.tables import EVALUATE, MERGE
from server.training.spec import JobSpec

Spec = JobSpec | MergeSpec | EvaluateSpec


def read_spec(document: Mapping[str, object]) -> Spec:
    """Read a document that any kind's `to_document` returned. Raise ValueError for any other document."""
    kind = document.get("kind")
    if kind == EVALUATE:
        return EvaluateSpec.from_document(document)
    return MergeSpec.from_document(document) if kind == MERGE else JobSpec.from_document(document)
