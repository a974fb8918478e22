"""The process in which one attempt at a job runs: `python -m server.training.run_job ASSIGNMENT`.

Started by `server.training.worker`, which keeps the lease. Here the base is loaded, `Run` does the work, and how
the job ended is stored: success and the new version in one transaction, a failure that another attempt would
repeat as a failure. Anything else that goes wrong is left to the exit code: the worker has it tried again.
"""

import logging
import shutil
import sys
from collections.abc import Mapping
from typing import cast

from adapters.catalog import Catalog, NewVersion
from adapters.errors import NotFound, SmoloraError
from adapters.expression import Term
from adapters.peft_format import PeftAdapter
from adapters.store import AdapterStore
from server.allocator import keep_freed_memory
from server.config import WorkerSettings
from server.database import connect
from server.model.device import choose_device
from server.model.export import export_hugging_face
from server.model.smollm import SmolLM
from server.model.source import resolve_base
from server.model.weights import BaseModel, load_base
from server.training.checkpoint import Checkpoints
from server.training.child import EXIT_DONE, EXIT_LEFT, Assignment, WorkerLink
from server.training.evaluate import Evaluation, evaluate
from server.training.gate import Gate, decide
from server.training.init import adapter_config
from server.training.job_data import JobData
from server.training.job_files import JobFiles
from server.training.jobs import Job, Jobs
from server.training.leases import Claim, LeaseLost, Leases
from server.training.report import AdapterFacts, Cost, Environment, Findings, build_report, peak_memory_bytes
from server.training.reserve import DISK_FULL, Reserve
from server.training.run import Outcome, Run
from server.training.share import BusyFlag, Yielding
from server.training.trained_rows import TrainedRows

log = logging.getLogger("smolora.job")


class Leave(Exception):
    """The worker wants this process to checkpoint and end."""


class _Reporter:
    """`run.Reporter` over the worker's pipe and the database."""

    def __init__(self, link: WorkerLink, leases: Leases, claim: Claim, yielding: Yielding) -> None:
        self._link = link
        self._leases = leases
        self._claim = claim
        self._yielding = yielding

    def between(self) -> None:
        self._link.beat()
        self._yielding.pause(self._goes_on)
        if self._link.should_leave:
            raise Leave

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        self._link.beat(progress, metrics)

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        self._leases.add_event(self._claim, message, type="metrics", data=data)

    def checkpointed(self, step: int) -> None:
        self._leases.checkpointed(self._claim, step)

    def _goes_on(self) -> bool:
        self._link.beat()
        return not self._link.should_leave


def main(argument: str) -> int:
    """Run the assignment; the exit code that the worker reads."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    assignment = Assignment.from_argument(argument)
    link = WorkerLink(assignment)
    keep_freed_memory()
    settings = WorkerSettings.model_validate(dict(assignment.settings))
    database = connect(settings.home)
    leases, claim = Leases(database), Claim(assignment.job_id, assignment.token, assignment.owner)
    reserve = Reserve(settings.home)
    try:
        job = Jobs(database).get(claim.job_id)
        _Attempt(job, claim, leases, Catalog(database), settings, link).run()
    except Leave:
        return EXIT_LEFT
    except LeaseLost:
        log.warning("the job is no longer this worker's")
        return EXIT_LEFT
    except Exception as error:
        log.exception("the attempt failed")
        if reserve.is_disk_full(error):
            reserve.spend_on(lambda: leases.fail(claim, DISK_FULL))
        elif isinstance(error, SmoloraError):
            leases.fail(claim, str(error))
        else:
            return 1
    return EXIT_DONE


class _Attempt:
    def __init__(
        self,
        job: Job,
        claim: Claim,
        leases: Leases,
        catalog: Catalog,
        settings: WorkerSettings,
        link: WorkerLink,
    ) -> None:
        self._job = job
        self._spec = job.spec
        self._claim = claim
        self._leases = leases
        self._catalog = catalog
        self._files = JobFiles(settings.home)
        self._store = AdapterStore(settings.home / "adapters")
        self._base = _load(settings)
        self._reporter = _Reporter(
            link, leases, claim, Yielding(BusyFlag(settings.home).read, settings.train_share)
        )

    def run(self) -> None:
        spec, directory = self._spec, self._files.directory(self._job.id)
        data = JobData.load(directory)
        parent = None
        if spec.start_from_digest is not None:
            parent = self._store.read(spec.start_from_digest, self._base.config.shape)
        run = Run(
            spec,
            data,
            self._base,
            Checkpoints(self._files.checkpoints(self._job.id), self._claim.token),
            self._reporter,
            start=None if parent is None else parent.weights,
            peak_memory=lambda: peak_memory_bytes(self._base.device),
        )
        try:
            outcome = run.run()
        except Leave:
            run.checkpoint()
            raise
        latest = self._latest_evaluation(data)
        gate = decide(spec.publish_if, outcome.tuned, outcome.base, latest, spec.method)
        adapter = None
        if outcome.weights is not None:
            config = adapter_config(spec.lora) if parent is None else parent.config
            adapter = PeftAdapter(config, outcome.weights, self._base.name)
        num_bytes = self._keep(adapter, outcome)
        report = self._report(data, outcome, gate, adapter, latest, num_bytes)
        metrics = run.metrics | _final_metrics(outcome)
        publish = None
        if adapter is not None and gate.passes:
            publish = self._new_version(adapter, num_bytes, metrics)
        self._leases.succeed(
            self._claim,
            progress=run.progress | {"eta_seconds": 0.0},
            metrics=metrics,
            report=report,
            publish=publish,
            alias=spec.alias,
        )
        if adapter is not None and publish is not None:
            self._store.put(adapter)  # once more: a delete may have raced with the publication

    def _keep(self, adapter: PeftAdapter | None, outcome: Outcome) -> int:
        """Store what was trained; its bytes."""
        if adapter is not None:
            return self._store.put(adapter)
        assert outcome.tuned_base is not None
        place = self._files.model(self._job.id)
        if place.exists():  # of an attempt that ended after this
            shutil.rmtree(place)
        export_hugging_face(outcome.tuned_base, place)
        return sum(path.stat().st_size for path in place.iterdir())

    def _latest_evaluation(self, data: JobData) -> Evaluation | None:
        """How the name's latest version does on the held-out rows, where the gate asks."""
        if self._spec.publish_if != "improves_latest" or data.validation is None:
            return None
        try:
            (part,) = self._catalog.resolve([Term(self._spec.name)])
        except NotFound:
            return None
        rows = TrainedRows(
            self._store.load(part.digest), self._base.config.shape, self._base.dtype, self._base.device
        )
        model = SmolLM(self._base.config, self._base.weights, max_positions=self._spec.training.max_length)
        return evaluate(model, rows, data.validation, between=self._reporter.between)

    def _report(
        self,
        data: JobData,
        outcome: Outcome,
        gate: Gate,
        adapter: PeftAdapter | None,
        latest: Evaluation | None,
        num_bytes: int,
    ) -> dict[str, object]:
        counters = outcome.counters
        facts = None
        if adapter is not None:
            facts = AdapterFacts(adapter.weights.digest, adapter.config, adapter.weights.num_parameters)
        findings = Findings(
            data=data.facts,
            cost=Cost(
                num_steps=outcome.step,
                epochs=outcome.epochs,
                num_tokens=counters.num_tokens,
                tokens_per_second=counters.tokens_per_second,
                wall_seconds=counters.wall_seconds,
                peak_memory_bytes=counters.peak_memory_bytes,
                bytes_stored=num_bytes,
            ),
            environment=Environment.of(self._base),
            num_trainable=outcome.num_trainable,
            adapter=facts,
            gate=gate,
            curves={"train_loss": counters.train_curve, "eval_loss": counters.eval_curve},
            base=outcome.base,
            tuned=outcome.tuned,
            latest=latest,
        )
        return build_report(self._spec, self._base, findings)

    def _new_version(self, adapter: PeftAdapter, num_bytes: int, metrics: Mapping[str, object]) -> NewVersion:
        return NewVersion(
            name=self._spec.name,
            digest=adapter.weights.digest,
            rank=adapter.config.rank,
            alpha=adapter.config.alpha,
            target_modules=adapter.weights.target_modules,
            parameters=adapter.weights.num_parameters,
            bytes=num_bytes,
            base_model=self._base.name,
            metrics=cast("Mapping[str, float]", {k: v for k, v in metrics.items() if isinstance(v, int | float)}),
            parent=self._spec.start_from,
            job_id=self._job.id,
        )


def _load(settings: WorkerSettings) -> BaseModel:
    """The base that the server serves, in the same dtype."""
    device, dtype = choose_device(settings.device, settings.dtype)
    return load_base(resolve_base(settings.model, settings.home, settings.base_dir), dtype, device)


def _final_metrics(outcome: Outcome) -> dict[str, object]:
    """The published weights' measures beside the base's, by the names that `GET /train/{id}` has."""
    found: dict[str, object] = {}
    for prefix, evaluation in (("", outcome.tuned), ("base_", outcome.base)):
        if evaluation is not None:
            measures = {
                "eval_loss": evaluation.loss,
                "eval_perplexity": evaluation.perplexity,
                "eval_accuracy": evaluation.accuracy,
                "eval_exact_match": evaluation.exact_match,
            }
            found |= {prefix + name: value for name, value in measures.items() if value is not None}
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
