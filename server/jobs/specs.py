"""The specification of a job of any kind, as it is stored with the job."""

from collections.abc import Mapping

from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.merge_spec import MergeSpec
from server.jobs.tables import EVALUATE, MERGE
from server.training.spec import JobSpec

Spec = JobSpec | MergeSpec | EvaluateSpec


def may_publish(spec: Spec) -> bool:
    """Return whether a job of this specification may publish a version. `num_publishing` does so in SQL."""
    return not isinstance(spec, EvaluateSpec) and not (isinstance(spec, JobSpec) and spec.method == "full")


def read_spec(document: Mapping[str, object]) -> Spec:
    """Read a document that any kind's `to_document` returned. Raise ValueError for any other document."""
    kind = document.get("kind")
    if kind == EVALUATE:
        return EvaluateSpec.from_document(document)
    return MergeSpec.from_document(document) if kind == MERGE else JobSpec.from_document(document)
