"""One attempt at a merge job: load the adapters, merge them, and publish the result with its report.

A merge takes seconds to minutes and has no checkpoints: an interrupted attempt is repeated, and produces the same
bytes. `run_job.py` starts the attempt and stores its failures. The report is the JSON of GET /train/{id}/report,
from which `server.training.model_card` makes a README.md.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from adapters.catalog.catalog import NewVersion, combine
from adapters.catalog.versions import Origin
from adapters.library import Library
from adapters.merge import config_of, distance, merge
from adapters.peft.files import PeftAdapter
from server.jobs.leases import Claim, Leases
from server.jobs.merge_spec import MergeSpec
from server.jobs.tables import MERGE
from server.model.base.weights import BaseModel
from server.training.report import AdapterFacts, Environment, adapter_document, peak_memory_bytes
from server.training.run import Reporter


@dataclass(frozen=True, eq=False)
class MergeFindings:
    """The results of a merge.

    `distance` is the result's relative distance from the adapters' exact weighted sum (`adapters.merge.distance`),
    or None if that sum is 0.
    `base_digest` is the digest of the base that the merged adapters were trained on, which may not be the served
    base. It is None if they were trained on different bases.
    """

    adapter: PeftAdapter
    base_digest: str | None
    distance: float | None
    wall_seconds: float
    peak_memory_bytes: int
    bytes_stored: int


def build_merge_report(spec: MergeSpec, base: BaseModel, found: MergeFindings) -> dict[str, object]:
    """Return the report as a JSON-ready document.

    The report has the merged adapters, the method, and the distance from the exact sum. The report's `base_model`
    describes the base that those adapters were trained on; unknown values are None. `base` is the served base.
    """
    weights = found.adapter.weights
    facts = AdapterFacts(weights.digest, found.adapter.config, weights.num_parameters)
    # The served base's size is known; that of the parts' base isn't, if it is another one.
    parameters = base.weights.num_parameters if found.base_digest == base.digest else None
    return {
        "format": 1,
        "kind": MERGE,
        "name": spec.name,
        "method": spec.method,
        "base_model": {"name": found.adapter.base_model, "digest": found.base_digest, "parameters": parameters},
        "adapter": adapter_document(facts),
        "distance": found.distance,
        "wall_seconds": found.wall_seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "bytes_stored": found.bytes_stored,
        "lineage": {"expression": spec.expression, "parts": [asdict(part) for part in spec.parts]},
        "config": spec.to_document(),
        "environment": asdict(Environment.of(base)),
    }


def run_merge(
    spec: MergeSpec,
    claim: Claim,
    leases: Leases,
    library: Library,
    base: BaseModel,
    reporter: Reporter,
    origin: Origin,
    require_room: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Merge the adapters of `spec` and publish the result. `require_room` is as in `TrainingAttempt`.

    `origin` names the base that the adapters were trained on. `origin` was stored when the job was submitted,
    since the adapters may be deleted before the job ends. Raise LeaseLost if the job has ended or another worker
    has claimed it, CorruptAdapter if an adapter's files are damaged, and any error of the reporter.
    """
    started = time.monotonic()
    adapters = []
    for digest, weight in combine(spec.parts):
        reporter.yield_or_leave()
        library.verify(digest)
        adapters.append((library.load(digest), weight))

    def yield_or_leave(done: int, total: int) -> None:
        reporter.yield_or_leave()
        reporter.progress({"step": done, "total_steps": total}, {})

    weights = merge(adapters, spec.recipe, yield_or_leave)
    # the parts' base, which may not be the served one
    is_served = origin.base_digest == base.digest
    base_model = base.name if is_served else origin.base_model
    config = config_of(weights, base.config.num_layers if is_served else None)
    adapter = PeftAdapter(config, weights, base_model)
    off = distance(adapters, weights, reporter.yield_or_leave)
    metrics = {"distance": off} if math.isfinite(off) else {}
    with reporter.transferring(4 * weights.num_parameters), library.publishing(adapter) as num_bytes:
        findings = MergeFindings(
            adapter=adapter,
            base_digest=origin.base_digest,
            distance=metrics.get("distance"),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(base.device),
            bytes_stored=num_bytes,
        )
        require_room(num_bytes)
        leases.succeed(
            claim,
            progress={"step": len(weights.modules), "total_steps": len(weights.modules), "eta_seconds": 0.0},
            metrics=dict(metrics),
            report=build_merge_report(spec, base, findings),
            publish=NewVersion(
                name=spec.name,
                digest=weights.digest,
                rank=adapter.config.rank,
                alpha=adapter.config.alpha,
                target_modules=weights.target_modules,
                parameters=weights.num_parameters,
                bytes=num_bytes,
                base_model=base_model,
                metrics=metrics,
                parent=spec.expression,
                base_digest=origin.base_digest,
                warnings=origin.warnings,
                config=spec.to_document(),
            ),
        )
