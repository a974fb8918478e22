"""One attempt at a training job: `Run` trains, and the result is stored and published.

The adapter's bytes are stored first. Then its version, its report and the job's end are stored in one transaction.
`server.jobs.run_job` starts the attempt and stores its failures.
"""

import ctypes
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import cast

from adapters import recorded
from adapters.catalog.catalog import NewVersion
from adapters.catalog.versions import VERDICT
from adapters.catalog.writes import LatestMoved
from adapters.errors import Conflict, CorruptAdapter, InvalidInput, LimitReached, NotFound
from adapters.expression import Term, parse
from adapters.library import Library
from adapters.lora import LoraConfig, LoraWeights
from adapters.peft.files import PeftAdapter
from adapters.storage.durable import remove_unfinished
from server.decisions.stored import KEY as DECISIONS
from server.errors import GenerationFailed
from server.jobs.events import SAMPLES
from server.jobs.files import JobFiles
from server.jobs.jobs import FINE_TUNING, STOP_STEP, Job, Status
from server.jobs.leases import Claim, LeaseLost, Leases
from server.jobs.reporter import Leave
from server.jobs.scoring import complete, decision_scores
from server.model.base.export import export_hugging_face
from server.model.base.weights import BaseModel
from server.model.device import is_out_of_memory
from server.storage.places import Storage
from server.training.checkpoint import Checkpoints
from server.training.decisions import by_question, fit_temperatures, question_reports, row_measures
from server.training.evaluate import Scores
from server.training.files import RowSources, results_id
from server.training.job_data import JobData
from server.training.report import (
    NAMES,
    AdapterFacts,
    Cost,
    Environment,
    Findings,
    Other,
    build_report,
    decide,
    peak_memory_bytes,
    step_metrics_csv,
)
from server.training.run import Outcome, Reporter, Run
from server.training.spec import MAX_MEASURED_RANK, JobSpec
from server.training.trained_rows import adapter_config
from server.training.verdicts import compare

MAX_DECISIONS = 5
"""The most evaluations of a name's latest version. If a newer version appears each time, the job is requeued."""


class TrainingAttempt:
    """An attempt. `run` trains and publishes, or raises Leave (after a checkpoint), LeaseLost, or an error.

    If the error is a SmoloraError, such as a Conflict about the adapter's name, every further attempt would raise
    it again.
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
        require_room: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`native` is the compiled library, or None to train with torch.

        `require_room` is called with the size of what the job is about to leave. It raises Forbidden if the
        project has no room for it.
        """
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
        self._require_room = require_room

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
            partial(complete, library=self._native),
            partial(decision_scores, library=self._native),
            start=None if parent is None else parent.weights,
            stop_step=cast("int | None", self._job.data.get(STOP_STEP)),
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
        if data.decisions is not None:
            fitted = fit_temperatures(data, outcome.tuned.held_out)
            data = replace(data, decisions=replace(data.decisions, temperatures=fitted))
        measured = _Measured()
        if parent is not None:
            weights = parent.weights
            measured = _measure(run, lambda: weights)
        for _ in range(MAX_DECISIONS - 1):
            with suppress(LatestMoved):
                return self._decide_and_end(run, data, outcome, adapter, measured)
        return self._decide_and_end(run, data, outcome, adapter, measured)

    def _decide_and_end(
        self, run: Run, data: JobData, outcome: Outcome, adapter: PeftAdapter | None, parent: "_Measured"
    ) -> None:
        """Compare the result with the base and earlier versions, decide whether to publish it, and end the job.

        Raise LatestMoved, with nothing published, if another version became the latest meanwhile.
        """
        spec, progress = self._spec, run.progress
        latest = self._latest(run, parent)
        measured: dict[Other, Scores | None] = {"base": outcome.base}
        versions: dict[Other, str] = {}
        unmeasured: dict[Other, str] = {}
        if latest.version:
            measured["latest"], versions["latest"] = latest.of.scores, f"{spec.name}@{latest.version}"
        if spec.start_from is not None:
            measured["parent"], versions["parent"] = parent.scores, spec.start_from
        if latest.of.fault:
            unmeasured["latest"] = f"{versions.get('latest', spec.name)} wasn't measured: {latest.of.fault}"
        if parent.fault:
            unmeasured["parent"] = f"{spec.start_from}, its parent, wasn't measured: {parent.fault}"
        comparisons = {
            name: None if of is None else compare(outcome.tuned, of, data, spec.publish_metric)
            for name, of in measured.items()
        }
        gate = decide(spec.publish_if, comparisons, spec.method, versions, unmeasured)
        num_bytes = self._keep(adapter, outcome)
        counters = outcome.counters
        cost = Cost(
            num_steps=outcome.num_steps,
            kept_step=outcome.step,
            epochs=outcome.epochs,
            num_tokens=counters.num_tokens,
            tokens_per_second=counters.tokens_per_second,
            wall_seconds=counters.wall_seconds,
            peak_memory_bytes=counters.peak_memory_bytes,
            bytes_stored=num_bytes,
        )
        evaluations = {str(name): None if of is None else of.held_out for name, of in measured.items()}
        evaluations["tuned"] = outcome.tuned.held_out
        test, on_test = data.of_test, outcome.on_test
        findings = Findings(
            data=data.facts,
            cost=cost,
            environment=Environment.of(self._base, counters.computed_by),
            num_trainable=outcome.num_trainable,
            adapter=None if adapter is None else _facts_of(adapter),
            gate=gate,
            curves={"train_loss": counters.train_curve, "eval_loss": counters.eval_curve},
            base=outcome.base,
            tuned=outcome.tuned,
            latest=latest.of.scores,
            parent=parent.scores,
            comparisons=comparisons,
            versions=versions,
            unmeasured=unmeasured,
            on_test=on_test,
            test_comparison=None
            if test is None or on_test is None
            else compare(
                *(on_test["tuned"], on_test["base"], test, spec.publish_metric),
                (by_question(data, evaluations["tuned"]), by_question(data, evaluations["base"])),
            ),
            decisions=question_reports(
                data,
                evaluations,
                None if on_test is None else {name: found.held_out for name, found in on_test.items()},
            ),
        )
        report = build_report(spec, self._base, findings)
        metrics = counters.newest_losses | _final_metrics(outcome, data)
        publish = worse = None
        warnings = []
        if adapter is not None and gate.passes:
            against_latest = comparisons.get("latest")
            verdict = None if against_latest is None else against_latest.verdict
            if against_latest is not None and verdict == "worse":
                worse = against_latest.sentence(versions["latest"])
            against_base = comparisons["base"]
            if against_base is not None and against_base.verdict == "worse":
                warnings.append(against_base.sentence(NAMES["base"]))
            publish = self._new_version(adapter, num_bytes, metrics, data, verdict, warnings)
        with nullcontext() if adapter is None else self._library.publishing(adapter):
            if publish is not None:
                self._require_room(num_bytes)
            if FINE_TUNING in self._job.data:
                tuned = outcome.tuned.held_out
                csv = step_metrics_csv(counters.train_curve, counters.eval_curve, outcome.step, tuned)
                self._results.put_results(self._job.id, csv)
            try:
                self._leases.succeed(
                    self._claim,
                    progress={**progress, "eta_seconds": 0.0},
                    metrics=metrics,
                    report=report,
                    publish=publish,
                    alias=spec.alias,
                    compared_with=latest.version,
                    worse=worse,
                    warnings=warnings,
                    notes=tuple(unmeasured.values()),
                    data={"step": outcome.step, SAMPLES: outcome.samples} if outcome.samples else {},
                    num_bytes=num_bytes if adapter is None else 0,
                )
            except (LeaseLost, LimitReached) as error:
                self._drop_results(is_failing=isinstance(error, LimitReached))
                raise
        if adapter is not None and publish is None:
            self._library.discard(adapter.weights.digest)

    def _drop_results(self, is_failing: bool) -> None:
        """Remove the stored results if the job is failing, has failed or was cancelled.

        Otherwise another attempt may use them.
        """
        if is_failing or self._leases.status(self._job.id) in (Status.CANCELLED, Status.FAILED):
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
        num_bytes = sum(tensor.nbytes for _, tensor in outcome.tuned_base.weights.tensors())
        self._require_room(num_bytes)
        with self._reporter.transferring(num_bytes):
            if place.exists():  # of an attempt that ended after this one
                shutil.rmtree(place)
            remove_unfinished(place.parent, place.name)  # and of one that was killed while writing
            export_hugging_face(outcome.tuned_base, place)
            num_bytes = sum(path.stat().st_size for path in place.iterdir())
            self._files.keep_model(self._job.id, self._claim.token)
        return num_bytes

    def _latest(self, run: Run, parent: "_Measured") -> "_Latest":
        """Measure the latest version of the job's adapter name on the job's data.

        `parent` has the measurements of the adapter that the job continued. They are returned if this adapter is
        the latest version. If the latest version can't be used, the reason is returned.
        """
        if self._spec.method == "full":
            return _Latest(None)
        name = self._spec.name
        try:
            pinned = self._library.pin([Term(name)])
        except NotFound:
            return _Latest(0)
        except (Conflict, CorruptAdapter) as error:
            self._library.check_name(name)
            return _Latest(None, _Measured(fault=str(error)))
        try:
            self._library.check_name(name)  # it may have become a composition's name since
            (part,) = pinned.parts
            if part.digest == self._spec.start_from_digest:
                return _Latest(part.version, parent)
            return _Latest(part.version, _measure(run, lambda: self._load_measurable(part.digest)))
        finally:
            pinned.release()

    def _load_measurable(self, digest: str) -> LoraWeights:
        """Return the adapter's weights.

        Raise CorruptAdapter if they are damaged, and MemoryError if the rank is above `MAX_MEASURED_RANK`.
        """
        rank = max(self._library.ranks(digest).values(), default=0)
        if rank > MAX_MEASURED_RANK:
            raise MemoryError(f"rank {rank} is above {MAX_MEASURED_RANK}")
        return self._library.load(digest)

    def _new_version(
        self,
        adapter: PeftAdapter,
        num_bytes: int,
        metrics: Mapping[str, object],
        data: JobData,
        verdict: str | None,
        warnings: Sequence[str],
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
            data_digest=data.facts.digest,
            config={
                **self._spec.to_document(),
                "kinds": dict(data.facts.kinds),
                **({} if data.decisions is None else {DECISIONS: data.decisions.document()}),
                **({} if verdict is None else {VERDICT: verdict}),
            },
            warnings=tuple(f"it is {text}" for text in warnings),
        )


@dataclass(frozen=True)
class _Measured:
    """Measurements of a published version, or the reason why there are none."""

    scores: Scores | None = None
    fault: str = ""


@dataclass(frozen=True)
class _Latest:
    """The latest version of the job's adapter name, and its measurements.

    `version` is 0 if the name has no version, and None if the job's result can't be compared with it.
    """

    version: int | None
    of: _Measured = field(default_factory=_Measured)


def _measure(run: Run, load: Callable[[], LoraWeights]) -> _Measured:
    """Measure a published adapter on the job's data.

    If the adapter is damaged or too large, return that as the reason: the finished job doesn't fail.
    """
    try:
        found = run.measure(load())
    except (CorruptAdapter, GenerationFailed, InvalidInput) as error:
        return _Measured(fault=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _Measured(fault=": ".join(filter(None, ("it takes too much memory", str(error)))))
    if found.held_out is not None and not found.held_out.is_finite:
        return _Measured(fault="its held-out loss is not a number, so that nothing can be compared with it")
    return _Measured(found)


def _facts_of(adapter: PeftAdapter) -> AdapterFacts:
    return AdapterFacts(adapter.weights.digest, adapter.config, adapter.weights.num_parameters)


def _final_metrics(outcome: Outcome, data: JobData) -> dict[str, object]:
    """Return the published weights' metrics and the base's, by their names in `GET /train/{id}`."""
    found: dict[str, object] = {}
    for prefix, scores in (("", outcome.tuned), ("base_", outcome.base)):
        measures: dict[str, float | None] = {}
        if (evaluation := scores.held_out) is not None:
            measures |= {
                "eval_loss": evaluation.loss,
                "eval_perplexity": evaluation.perplexity,
                "eval_accuracy": evaluation.accuracy,
                "eval_exact_match": evaluation.exact_match,
            }
        are_right, brier_scores = row_measures(data, scores.held_out)
        if are_right:
            measures["decision_accuracy"] = fmean(are_right)
            measures["decision_brier"] = fmean(brier_scores)
        if scores.recalled:
            measures["recall"] = sum(scores.recalled) / len(scores.recalled)
        found |= {prefix + name: value for name, value in measures.items() if value is not None}
    return found
