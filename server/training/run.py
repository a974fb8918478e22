"""One attempt at a training job, from its data to its adapter: train, evaluate, keep checkpoints, report.

`Run` resumes from the newest checkpoint, and arrives at the same weights as an uninterrupted run. It reports its
progress to a `Reporter`. The package `server.jobs` assigns jobs to workers, runs the processes and publishes
results.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Protocol

import torch

from adapters.lora import LoraWeights
from server.model.base.weights import BaseModel
from server.training.checkpoint import Checkpoint, Checkpoints
from server.training.encoding import Examples, Reference, Sample
from server.training.evaluate import Evaluation, LossNotFinite, Scores, evaluate
from server.training.job_data import JobData
from server.training.passes import Pass
from server.training.spec import DECISION_METRICS, JobSpec, read_document
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import StepResult, Trainer, TrainingDiverged
from server.training.verdicts import Comparison, compare_held_out

log = logging.getLogger("smolora.training")

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints, if the job doesn't set `checkpoint_steps`."""
MAX_SAMPLED = 4
"""The most evaluations during training at which samples are answered, apart from that of the last step."""

Complete = Callable[
    [BaseModel, LoraWeights | None, Sequence[Sample], Sequence[Reference], Callable[[], None]],
    tuple[Sequence[str | None], Sequence[bool] | None],
]
"""Returns the answer of the base with the weights to each sample, or None if it can't be given, and which
references it completes exactly, or None if that can't be measured. The last argument is called before each step of
the engine."""
DecisionScores = Callable[
    [BaseModel, LoraWeights | None, JobData, Callable[[], None]], Sequence[tuple[float, ...]] | None
]
"""Returns `Evaluation.option_scores` of the base with the weights. The last argument is as above."""


class Reporter(Protocol):
    """Receiver of the progress of a run or a merge. Any method may raise to end the run; checkpoints are kept."""

    def yield_or_leave(self) -> None:
        """Yield to serving, or raise if the run should stop.

        Called before each micro-batch, each step of the engine that measures exact match or decisions or answers
        samples, and each module that is merged or decomposed.
        """
        ...

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        """Return a context manager for reading or writing `num_bytes`.

        Within it the run counts as alive without reports of progress, for as long as that may take.
        """
        ...

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        """Return a context manager for computing a pass over `num_tokens`.

        Within it the run counts as alive without reports of progress, for as long as that may take.
        """
        ...

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        """Report the progress after each step."""
        ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        """Report measurements of the step `data["step"]`."""
        ...

    def flush(self) -> None:
        """Store the reported measurements. Called before a checkpoint: its steps won't be computed again."""
        ...

    def checkpointed(self, step: int) -> None:
        """Report that a checkpoint of this step is stored."""
        ...


@dataclass
class Counters:
    """A run's counters and measurements so far; part of each checkpoint."""

    num_tokens: int = 0
    timed_tokens: int = 0  # of timed steps: all except the first of each attempt
    timed_seconds: float = 0.0  # of timed steps
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    best: Evaluation | None = None  # later ones aren't better by more than one standard error
    best_step: int = 0
    keeps_best: bool = False  # the newest evaluation is worse than the best by more than one standard error
    num_without_gain: int = 0  # evaluations since the best one
    stopped_early: bool = False
    computed_by: list[str] = field(default_factory=list)  # as in `report.Environment`; one per change
    base: Scores | None = None  # of the untouched base
    unreported: StepResult | None = None  # the last step, until it is evaluated (if due) and reported
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    eval_curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    @property
    def newest_losses(self) -> dict[str, object]:
        """The newest losses, by their names in `GET /train/{id}`."""
        found: dict[str, object] = {}
        if self.train_curve:
            found["train_loss"] = self.train_curve[-1][1]
        if self.eval_curve:
            found["eval_loss"] = self.eval_curve[-1][1]
        if self.base is not None and self.base.held_out is not None:
            found["base_eval_loss"] = self.base.held_out.loss
        return found

    def note_held_out(self, step: int, found: Evaluation, against_best: Comparison | None) -> bool:
        """Add an evaluation to the curve. Return whether it is the best so far.

        `against_best` compares the evaluation with the best earlier one, or with itself if there is none.
        `against_best` is None if there are too few held-out rows to compare: then `best` and `num_without_gain`
        don't change.
        """
        self.eval_curve.append((step, found.loss))
        if against_best is None:
            return False
        if self.best is None or against_best.is_gain:
            self.best, self.best_step, self.num_without_gain, self.keeps_best = found, step, 0, False
            return True
        self.num_without_gain += 1
        self.keeps_best = against_best.is_loss
        return False


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a finished run: the weights of `step`, and their measurements on the job's rows.

    `step` is the last one, unless an evaluation during training was better by more than one standard error.
    `samples` are the answers of its weights to the job's samples, unless they were reported during training.
    """

    weights: LoraWeights | None  # None: full fine-tuning, whose weights are `tuned_base`'s
    tuned_base: BaseModel | None
    step: int
    num_steps: int
    num_trainable: int
    base: Scores
    tuned: Scores
    counters: Counters
    epochs: float
    samples: Sequence[Mapping[str, object]] = ()
    on_test: Mapping[Literal["base", "tuned"], Scores] | None = None  # None: there are no test rows


class Run:
    """One attempt at a job. `start` is the adapter that the job continues, if the job names one.

    After `stop_step`, if given, the run trains no further, and ends as after its last step.
    `library` is the native code, if this machine has it and it supports the base. The constructor may take minutes
    (see `initial_weights`); it calls the reporter meanwhile.
    """

    def __init__(
        self,
        spec: JobSpec,
        data: JobData,
        base: BaseModel,
        checkpoints: Checkpoints,
        reporter: Reporter,
        complete: Complete,
        decision_scores: DecisionScores,
        *,
        start: LoraWeights | None = None,
        stop_step: int | None = None,
        library: ctypes.CDLL | None = None,
        peak_memory: Callable[[], int] = lambda: 0,
    ) -> None:
        self._spec = spec
        self._data = data
        self._base = base
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._complete = complete
        self._decision_scores = decision_scores
        self._peak_memory = peak_memory
        self._library = library
        self._stop_step = stop_step
        self._trainable = self._make_trainable(start)
        self._trainer = Trainer(self._trainable, data.train, spec.training)
        self._best: torch.Tensor | None = None
        self._counters = Counters()
        self._started = time.monotonic()
        self._last_checkpoint = self._started
        self._is_first_step = True

    def run(self) -> Outcome:
        """Train to the end and evaluate. Raise TrainingDiverged, LossNotFinite, or the reporter's exceptions."""
        self._go_on_from_checkpoint()
        self._note_who_computes()
        if not self._has_base():
            self._counters.base = base = self.measure(LoraWeights({}), self._data.samples)
            if base.held_out is not None and not base.held_out.is_finite:
                raise LossNotFinite(
                    "the untouched base's loss on the held-out rows is not a number: its weights are damaged, or "
                    "too large for its dtype; set SMOLORA_DTYPE=fp32 or another SMOLORA_MODEL, and submit again"
                )
        try:
            self._report_step()
            while self._trainer.step < self._last_step and not self._counters.stopped_early:
                self._step()
        except BaseException:
            self._trainable.end_step()
            raise
        return self._finish()

    def measure(self, weights: LoraWeights, samples: Sequence[Sample] = (), data: JobData | None = None) -> Scores:
        """Measure an adapter on the job's rows, in the same way as trained weights. Empty ones mean the base.

        The adapter also answers `samples`. `data` has other rows to measure it on.
        """
        passes = trainable_rows(
            self._base, weights, None, max_length=self._longest, dropout=0.0, library=self._library
        ).passes
        return self._measure(passes, weights if weights.modules else None, samples=samples, data=data)

    def checkpoint(self) -> None:
        """Store a checkpoint of the state after the last optimizer step."""
        trainer, counters = self._trainer, self._counters
        self._note_time()
        tensors = dict(trainer.state())
        if self._best is not None:
            tensors["best"] = self._best
        self._reporter.flush()
        with self._reporter.transferring(self._max_checkpoint_bytes):
            self._checkpoints.save(Checkpoint(trainer.step, tensors, asdict(counters)))
        self._last_checkpoint = time.monotonic()
        self._reporter.checkpointed(trainer.step)

    @property
    def progress(self) -> dict[str, object]:
        """The progress, as `GET /train/{id}` shows it."""
        trainer, counters = self._trainer, self._counters
        left = (trainer.total_steps - trainer.step) * (counters.num_tokens / max(1, trainer.step))
        rate = counters.tokens_per_second
        return {
            "step": trainer.step,
            "total_steps": trainer.total_steps,
            "epoch": round(trainer.epoch, 4),
            "tokens": counters.num_tokens,
            "tokens_per_second": round(rate, 1),
            "eta_seconds": round(left / rate, 1) if rate else None,
        }

    @property
    def _last_step(self) -> int:
        total = self._trainer.total_steps
        return total if self._stop_step is None else min(total, self._stop_step)

    @property
    def _longest(self) -> int:
        """The maximum length of a row: the model needs this many positions."""
        return self._spec.training.max_length

    @property
    def _max_checkpoint_bytes(self) -> int:
        """The maximum size of a checkpoint: weights, AdamW's two moments and the best weights, in fp32."""
        return 4 * 4 * self._trainable.masters.numel()

    def _make_trainable(self, start: LoraWeights | None) -> TrainableRows | TrainableModel:
        if self._spec.method == "full":
            return TrainableModel(self._base, max_length=self._longest, library=self._library)
        subtracted = None
        if start is None:
            seed, yield_or_leave = self._spec.training.seed, self._reporter.yield_or_leave
            start, subtracted = initial_weights(self._spec.lora, self._base, seed, yield_or_leave)
        dropout = self._spec.lora.dropout
        return trainable_rows(
            self._base, start, subtracted, max_length=self._longest, dropout=dropout, library=self._library
        )

    def _has_base(self) -> bool:
        """Return whether the base was measured. Older releases' checkpoints lack some of its measurements."""
        base, data = self._counters.base, self._data
        if base is None or len(base.answers) != len(data.samples):
            return False
        return base.held_out is not None or data.validation is None

    def _go_on_from_checkpoint(self) -> None:
        with self._reporter.transferring(self._max_checkpoint_bytes):
            found = self._checkpoints.newest()
        if found is None:
            return
        tensors = dict(found.tensors)
        best = tensors.pop("best", None)
        self._trainer.restore(tensors, found.step)
        self._counters = read_document(Counters, found.state)
        if best is not None and self._counters.best is not None:  # an older release chose the best by loss alone
            self._best = best.to(self._base.device)

    def _note_who_computes(self) -> None:
        """Record which code computes this attempt's steps.

        If a job's attempts used different code, the result's bytes differ from those that either code alone gives,
        and the model card lists all code that was used.
        """
        now, before = self._trainable.passes.computed_by, self._counters.computed_by
        if before and before[-1] != now:
            log.warning("continuing with %s after %s: the bytes will differ from those of either", now, before[-1])
        if not before or before[-1] != now:
            before.append(now)

    def _step(self) -> None:
        result = self._trainer.run_step(self._reporter.yield_or_leave, self._reporter.computing)
        self._count(result)
        self._report_step()

    def _report_step(self) -> None:
        """Evaluate the last step's weights if an evaluation is due, and report the step, unless it was reported.

        If an attempt ends before the report is complete, the next attempt repeats evaluation and report.
        """
        counters, result = self._counters, self._counters.unreported
        if result is None:
            return
        data: dict[str, object] = {
            "step": result.step,
            "train_loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
        }
        message = f"step {result.step}: loss {result.loss:.4f}"
        found = self._held_out() if self._is_evaluation_due() else None
        if found is not None:
            data["eval_loss"] = found.loss
            message += f", held-out {found.loss:.4f}"
            if found.exact_match is not None:
                data["eval_exact_match"] = found.exact_match
                message += f", {found.exact_match:.2%} exactly right"
            if self._is_sampled(result.step) and self._data.samples:
                data["samples"] = self._documents(self._answers())
        self._reporter.metrics(message, data)
        if found is not None:
            metric = self._spec.publish_metric
            against_best = compare_held_out(found, counters.best or found, self._data, metric)
            if counters.note_held_out(result.step, found, against_best):
                self._best = self._trainable.masters.clone()
            patience = self._spec.training.early_stopping_patience
            counters.stopped_early = patience is not None and counters.num_without_gain >= patience
        counters.unreported = None
        self._reporter.progress(self.progress, counters.newest_losses)
        if self._is_checkpoint_due():
            self.checkpoint()

    def _count(self, result: StepResult) -> None:
        counters = self._counters
        counters.num_tokens += result.num_tokens
        if not self._is_first_step:  # the first step warms up caches
            counters.timed_tokens += result.num_tokens
            counters.timed_seconds += result.seconds
        self._is_first_step = False
        counters.train_curve.append((result.step, result.loss))
        counters.unreported = result

    def _is_evaluation_due(self) -> bool:
        every, step = self._spec.training.eval_steps, self._trainer.step
        return every is not None and (step % every == 0 or step == self._trainer.total_steps)

    def _is_sampled(self, step: int) -> bool:
        """Return whether the samples are answered at the evaluation of `step` during training, if there is one.

        It depends on the job's settings alone, so that a resumed job answers them at the same steps.
        """
        every, total = self._spec.training.eval_steps, self._trainer.total_steps
        if every is None:
            return False
        stride = max(1, -(-(total // every) // MAX_SAMPLED))  # in evaluations
        return step == total or (step % every == 0 and step // every % stride == 0)

    def _answers(self) -> Sequence[str | None]:
        """Return the current weights' answers to the job's samples."""
        weights, tuned_base = self._weights()
        base, yield_or_leave = tuned_base or self._base, self._reporter.yield_or_leave
        return self._complete(base, weights, self._data.samples, (), yield_or_leave)[0]

    def _documents(self, tuned: Sequence[str | None]) -> list[Mapping[str, object]]:
        """Return the job's samples as JSON, each with the base's answer and that of `tuned`."""
        assert self._counters.base is not None, "measured before the first step"
        answered = zip(self._data.samples, self._counters.base.answers, tuned, strict=True)
        return [
            {"prompt": one.prompt, "wanted": one.reference.text, "base": of_base, "tuned": of_tuned}
            for one, of_base, of_tuned in answered
        ]

    def _held_out(self) -> Evaluation:
        """Evaluate the current weights on the held-out rows.

        Exact match and decisions are measured only if the best step is chosen by them.
        """
        assert self._data.validation is not None, "an evaluation without held-out rows"
        found = self._evaluate(self._trainable.passes, self._data.validation)
        self._check_finite(found)
        if self._spec.publish_metric == "loss":
            return found
        weights, tuned_base = self._weights()
        if self._spec.publish_metric in DECISION_METRICS:
            return self._with_decisions(found, tuned_base, weights, self._data)
        base, yield_or_leave = tuned_base or self._base, self._reporter.yield_or_leave
        _, matches = self._complete(base, weights, (), self._data.references, yield_or_leave)
        return replace(found, matches=None if matches is None else tuple(matches))

    def _is_checkpoint_due(self) -> bool:
        every = self._spec.training.checkpoint_steps
        if every is not None:
            return self._trainer.step % every == 0
        return time.monotonic() - self._last_checkpoint >= CHECKPOINT_SECONDS

    def _finish(self) -> Outcome:
        self.checkpoint()  # the next attempt repeats only what follows
        trainable = self._trainable
        step = self._trainer.step
        if self._best is not None and self._counters.keeps_best:
            trainable.masters.copy_(self._best)
            trainable.refresh()
            step = self._counters.best_step
        weights, tuned_base = self._weights()
        is_finite = bool(trainable.masters.isfinite().all())
        tuned = Scores()
        if is_finite or self._data.validation is not None:
            samples = () if self._is_sampled(step) else self._data.samples
            tuned = self._measure(trainable.passes, weights, tuned_base, samples)
        if tuned.held_out is not None:
            self._check_finite(tuned.held_out)
        if not is_finite:  # without held-out rows, no loss has revealed it
            raise TrainingDiverged.found(f"the weights are not finite after step {step}", self._spec.training)
        on_test: dict[Literal["base", "tuned"], Scores] | None = None
        if (test := self._data.of_test) is not None:
            on_test = {
                "base": self.measure(LoraWeights({}), data=test),
                "tuned": self._measure(trainable.passes, weights, tuned_base, data=test),
            }
            for found in on_test.values():
                assert found.held_out is not None, "there are test rows"
                self._check_finite(found.held_out, "test")
        self._note_time()
        counters = self._counters
        assert counters.base is not None, "measured before the first step"
        return Outcome(
            weights=weights,
            tuned_base=tuned_base,
            step=step,
            num_steps=self._trainer.step,
            num_trainable=trainable.masters.numel(),
            base=counters.base,
            tuned=tuned,
            counters=counters,
            epochs=self._trainer.epoch,
            samples=self._documents(tuned.answers) if tuned.answers else (),
            on_test=on_test,
        )

    def _weights(self) -> tuple[LoraWeights | None, BaseModel | None]:
        """Return (adapter, None), or after full fine-tuning (None, model)."""
        if isinstance(self._trainable, TrainableRows):
            return self._trainable.rows.weights(), None
        return None, self._trainable.tuned(self._base)

    def _measure(
        self,
        passes: Pass,
        weights: LoraWeights | None,
        tuned_base: BaseModel | None = None,
        samples: Sequence[Sample] = (),
        data: JobData | None = None,
    ) -> Scores:
        """Measure loss, accuracy and, if the loss is finite, decisions and exact matches. Answer `samples`.

        The rows are those of `data`, or the job's.
        """
        data = data or self._data
        found = None if data.validation is None else self._evaluate(passes, data.validation)
        if found is not None and not found.is_finite:
            return Scores(found)
        if found is not None:
            found = self._with_decisions(found, tuned_base, weights, data)
        held_out, trained = data.references, data.trained_references
        base, yield_or_leave = tuned_base or self._base, self._reporter.yield_or_leave
        answers, matches = self._complete(base, weights, samples, [*held_out, *trained], yield_or_leave)
        if matches is None:
            return Scores(found, answers=tuple(answers))
        if found is not None and held_out:
            found = replace(found, matches=tuple(matches[: len(held_out)]))
        return Scores(found, tuple(matches[len(held_out) :]) if trained else None, tuple(answers))

    def _with_decisions(
        self, found: Evaluation, tuned_base: BaseModel | None, weights: LoraWeights | None, data: JobData
    ) -> Evaluation:
        """Return the evaluation with the scores of the options of `data.asked`."""
        yield_or_leave = self._reporter.yield_or_leave
        scores = self._decision_scores(tuned_base or self._base, weights, data, yield_or_leave)
        return found if scores is None else replace(found, option_scores=tuple(scores))

    def _evaluate(self, passes: Pass, rows: Examples) -> Evaluation:
        """Measure loss and accuracy on the rows."""
        reporter = self._reporter
        return evaluate(
            passes,
            rows,
            keys=rows.row_keys(),
            yield_or_leave=reporter.yield_or_leave,
            computing=reporter.computing,
        )

    def _check_finite(self, found: Evaluation, rows: str = "held-out") -> None:
        if not found.is_finite:
            what = f"the {rows} loss is not a number after step {self._trainer.step}"
            raise TrainingDiverged.found(what, self._spec.training)

    def _note_time(self) -> None:
        now = time.monotonic()
        self._counters.wall_seconds += now - self._started
        self._started = now
        self._counters.peak_memory_bytes = max(self._counters.peak_memory_bytes, self._peak_memory())
