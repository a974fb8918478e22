"""The card of a merged adapter: what it was made of and how, and how far it is from the exact sum.

It is the JSON of GET /train/{id}/report; `server.training.reports.model_card` makes a README.md of it.
"""

from dataclasses import asdict, dataclass

from adapters.peft.files import PeftAdapter
from server.model.base.weights import BaseModel
from server.training.merge_spec import MergeSpec
from server.training.queue.tables import MERGE
from server.training.reports.report import AdapterFacts, Environment, adapter_document


@dataclass(frozen=True, eq=False)
class MergeFindings:
    """What a merge found out. `distance` is `adapters.merging.distance`'s; None where the exact sum is 0.

    `base_digest` is that of the parts' base, which needn't be the one that is served; None where they don't agree.
    """

    adapter: PeftAdapter
    base_digest: str | None
    distance: float | None
    wall_seconds: float
    peak_memory_bytes: int
    bytes_stored: int


def build_merge_report(spec: MergeSpec, base: BaseModel, found: MergeFindings) -> dict[str, object]:
    """The card, JSON-ready."""
    weights = found.adapter.weights
    facts = AdapterFacts(weights.digest, found.adapter.config, weights.num_parameters)
    name = found.adapter.base_model or base.name
    return {
        "format": 1,
        "kind": MERGE,
        "name": spec.name,
        "method": spec.method,
        "base_model": {"name": name, "digest": found.base_digest, "parameters": base.weights.num_parameters},
        "adapter": adapter_document(facts),
        "distance": found.distance,
        "wall_seconds": found.wall_seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "bytes_stored": found.bytes_stored,
        "lineage": {"expression": spec.expression, "parts": [asdict(part) for part in spec.parts]},
        "config": spec.to_document(),
        "environment": asdict(Environment.of(base)),
    }
