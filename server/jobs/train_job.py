"""One attempt at a training job: `Run` trains, and the result is stored and published.

The adapter's bytes are stored first. Then its version, its report and the job's end are stored in one transaction.
`server.jobs.run_job` starts the attempt and stores its failures.
"""

import ctypes
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import cast

from adapters import recorded
from adapters.catalog.catalog import NewVersion
from adapters.catalog.writes import LatestMoved
from adapters.errors import NotFound
from adapters.expression import Term, parse
from adapters.library import Library
from adapters.lora import LoraConfig
from adapters.peft.files import PeftAdapter
from adapters.storage.durable import remove_unfinished
from server.jobs.exact_match import exact_match
from server.jobs.files import JobFiles
from server.jobs.jobs import FINE_TUNING, Job, Status
from server.jobs.leases import Claim, LeaseLost, Leases
from server.jobs.reporter import Leave
from server.model.base.export import export_hugging_face
from server.model.base.weights import BaseModel
from server.storage.places import Storage
from server.training.checkpoint import Checkpoints
from server.training.evaluate import Evaluation, LossNotFinite, evaluate
from server.training.files import RowSources, results_id
from server.training.job_data import DataFacts, JobData
from server.training.report import (
    AdapterFacts,
    Cost,
    Environment,
    Findings,
    Gate,
    build_report,
    decide,
    peak_memory_bytes,
    step_metrics_csv,
)
from server.training.run import Outcome, Reporter, Run
from server.training.spec import JobSpec
from server.training.trainables import trainable_rows
from server.training.trained_rows import adapter_config

MAX_DECISIONS = 5
"""The most evaluations of a name's latest version. If a newer version appears each time, the job is requeued."""


class TrainingAttempt:
    """An attempt. `run` trains and publishes, or raises Leave (after a checkpoint), LeaseLost, or an error.

    If the error is a SmoloraError, such as a Conflict about the name, the next attempt would fail with it, too.
    """

    def __init__(
        self,
        job: Job,
        spec: JobSpec,
        claim: Claim,
        leases: Leases,
        library: Library,
        base: BaseModel,
        reporter: Reporter,
        storage: Storage,
        native: ctypes.CDLL | None = None,
    ) -> None:
        """`native` is the compiled library, or None to train with torch."""
        self._job = job
        self._spec = spec
        self._claim = claim
        self._leases = leases
        self._library = library
        self._files = JobFiles(storage.home.path, storage.bucket)
        self._results = RowSources.of(storage, job.project, job.key_id).files
        directory = self._files.checkpoints(job.id)
        self._checkpoints = Checkpoints(directory, claim.token, storage.bucket, job.id)
        self._base = base
        self._reporter = reporter
        self._native = native

    def run(self) -> None:
        spec, directory = self._spec, self._files.directory(self._job.id)
        data = JobData.load(directory)
        data.check_base(self._base)
        if spec.method == "lora":
            self._library.check_name(spec.name)  # again: it was valid when the job was submitted
        parent = None
        if spec.start_from_digest is not None:
            parent = self._library.read(spec.start_from_digest)
        run = Run(
            spec,
            data,
            self._base,
            self._checkpoints,
            self._reporter,
            partial(exact_match, library=self._native),
            start=None if parent is None else parent.weights,
            library=self._native,
            peak_memory=lambda: peak_memory_bytes(self._base.device),
        )
        try:
            outcome = run.run()
        except Leave:
            run.checkpoint()
            raise
        adapter = None
        if outcome.weights is not None:
            config = adapter_config(spec.lora) if parent is None else self._config_of(parent)
            adapter = PeftAdapter(config, outcome.weights, self._base.name)
        for _ in range(MAX_DECISIONS - 1):
            with suppress(LatestMoved):
                return self._decide_and_end(data, run.progress, outcome, adapter)
        return self._decide_and_end(data, run.progress, outcome, adapter)

    def _decide_and_end(
        self, data: JobData, progress: Mapping[str, object], outcome: Outcome, adapter: PeftAdapter | None
    ) -> None:
        """Check the result against the gate, and end the job.

        Raise LatestMoved, with nothing published, if another version became the latest meanwhile.
        """
        spec = self._spec
        latest, number = self._latest_evaluation(data)
        gate = decide(spec.publish_if, outcome.tuned, outcome.base, latest, spec.method)
        num_bytes = self._keep(adapter, outcome)
        report = self._report(data, outcome, gate, adapter, latest, num_bytes)
        metrics = outcome.counters.newest_losses | _final_metrics(outcome)
        publish = None
        if adapter is not None and gate.passes:
            publish = self._new_version(adapter, num_bytes, metrics, data.facts)
        with nullcontext() if adapter is None else self._library.publishing(adapter):
            if FINE_TUNING in self._job.data:
                counters = outcome.counters
                csv = step_metrics_csv(counters.train_curve, counters.eval_curve, outcome.step, outcome.tuned)
                self._results.put_results(self._job.id, csv)
            try:
                self._leases.succeed(
                    self._claim,
                    progress={**progress, "eta_seconds": 0.0},
                    metrics=metrics,
                    report=report,
                    publish=publish,
                    alias=spec.alias,
                    better_than=number,
                )
            except LeaseLost:
                self._drop_results()
                raise
        if adapter is not None and publish is None:
            self._library.discard(adapter.weights.digest)

    def _drop_results(self) -> None:
        """Remove the stored results if the job has failed or was cancelled.

        Otherwise another attempt may use them.
        """
        if self._leases.status(self._job.id) in (Status.CANCELLED, Status.FAILED):
            with suppress(NotFound):
                self._results.delete(results_id(self._job.id))

    def _config_of(self, parent: PeftAdapter) -> LoraConfig:
        """Return the parent version's config.

        If that version was deleted, return a config of the spec's rank and alpha.
        """
        num_layers = self._base.config.shape.num_layers
        assert self._spec.start_from is not None
        try:
            (version,) = self._library.named(parse(self._spec.start_from))
        except NotFound:
            lora = self._spec.lora
            return recorded.shaped(parent, lora.rank, lora.alpha, lora.use_rslora, num_layers)
        return recorded.config_of(version, parent, num_layers)

    def _keep(self, adapter: PeftAdapter | None, outcome: Outcome) -> int:
        """Store the adapter, or the model if all its weights were trained. Return the size in bytes."""
        if adapter is not None:
            with self._reporter.transferring(4 * adapter.weights.num_parameters):
                return self._library.keep(adapter)
        assert outcome.tuned_base is not None
        place = self._files.model(self._job.id)
        with self._reporter.transferring(sum(tensor.nbytes for _, tensor in outcome.tuned_base.weights.tensors())):
            if place.exists():  # of an attempt that ended after this one
                shutil.rmtree(place)
            remove_unfinished(place.parent, place.name)  # and of one that was killed while writing
            export_hugging_face(outcome.tuned_base, place)
            num_bytes = sum(path.stat().st_size for path in place.iterdir())
            self._files.keep_model(self._job.id, self._claim.token)
        return num_bytes

    def _latest_evaluation(self, data: JobData) -> tuple[Evaluation | None, int | None]:
        """Evaluate the name's latest version on held-out rows if the gate compares with it.

        Return the evaluation and the version's number, which is 0 if there is no version. Return None for both if
        the gate doesn't compare with it.
        """
        if self._spec.publish_if != "improves_latest" or data.validation is None:
            return None, None
        name = self._spec.name
        try:
            pinned = self._library.pin([Term(name)])
        except NotFound:
            return None, 0
        try:
            self._library.check_name(name)  # it may have become a composition's name since
            (part,) = pinned.parts
            weights = self._library.load(part.digest)
            longest = self._spec.training.max_length
            measured = trainable_rows(
                self._base, weights, None, max_length=longest, dropout=0.0, library=self._native
            )
            yield_or_leave, computing = self._reporter.yield_or_leave, self._reporter.computing
            found = evaluate(measured.passes, data.validation, yield_or_leave=yield_or_leave, computing=computing)
        finally:
            pinned.release()
        if not found.is_finite:
            raise LossNotFinite(
                f"the held-out loss of {name}@{part.version} is not a number, so that nothing improves on it: "
                "delete that version, or submit again with publish_if always or improves_base"
            )
        return found, part.version

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
                num_steps=outcome.num_steps,
                kept_step=outcome.step,
                epochs=outcome.epochs,
                num_tokens=counters.num_tokens,
                tokens_per_second=counters.tokens_per_second,
                wall_seconds=counters.wall_seconds,
                peak_memory_bytes=counters.peak_memory_bytes,
                bytes_stored=num_bytes,
            ),
            environment=Environment.of(self._base, counters.computed_by),
            num_trainable=outcome.num_trainable,
            adapter=facts,
            gate=gate,
            curves={"train_loss": counters.train_curve, "eval_loss": counters.eval_curve},
            base=outcome.base,
            tuned=outcome.tuned,
            latest=latest,
        )
        return build_report(self._spec, self._base, findings)

    def _new_version(
        self, adapter: PeftAdapter, num_bytes: int, metrics: Mapping[str, object], data: DataFacts
    ) -> NewVersion:
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
            base_digest=self._base.digest,
            data_digest=data.digest,
            config={**self._spec.to_document(), "kinds": dict(data.kinds)},
        )


def _final_metrics(outcome: Outcome) -> dict[str, object]:
    """Return the published weights' metrics and the base's, by their names in `GET /train/{id}`."""
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
