"""One attempt at a training job, from its data to its adapter: train, evaluate, keep checkpoints, report.

`Run` resumes from the newest checkpoint, wherever the last attempt ended, and arrives at the same weights as an
uninterrupted run. It reports through a `Reporter`; leases, publishing and processes belong to `server.jobs`.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import torch

from adapters.lora import LoraWeights
from server.model.base.weights import BaseModel
from server.training.checkpoint import Checkpoint, Checkpoints
from server.training.encoding import Reference
from server.training.evaluate import Evaluation, LossNotFinite, evaluate
from server.training.job_data import JobData
from server.training.passes import Pass
from server.training.spec import JobSpec, read_document
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import StepResult, Trainer, TrainingDiverged

log = logging.getLogger("smolora.training")

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints, if the job doesn't set `checkpoint_steps`."""

ExactMatch = Callable[[BaseModel, LoraWeights | None, Sequence[Reference], Callable[[], None]], float | None]
"""Returns the share of references that the base with the weights completes exactly. The last argument is called
before each step of the engine."""


class Reporter(Protocol):
    """Receiver of the progress of a run or a merge. Any method may raise to end the run; checkpoints are kept."""

    def yield_or_leave(self) -> None:
        """Yield to serving, or raise if the run should stop. Called at least once per micro-batch or module."""
        ...

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        """Return a context manager for reading or writing `num_bytes` in calls that can't report progress."""
        ...

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        """Return a context manager for computing with `num_tokens` in calls that can't report progress."""
        ...

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        """Report the progress after each step."""
        ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        """Report measurements of the step `data["step"]`."""
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
    best_loss: float | None = None
    best_step: int = 0
    num_without_gain: int = 0  # evaluations since the best one
    stopped_early: bool = False
    computed_by: list[str] = field(default_factory=list)  # as in `report.Environment`; one per change
    base: Evaluation | None = None  # of the untouched base
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
        if self.base is not None:
            found["base_eval_loss"] = self.base.loss
        return found

    def note_held_out(self, step: int, loss: float, patience: int | None) -> bool:
        """Add an evaluation to the curve. Return whether it is the best so far.

        `patience` evaluations in a row without a new best stop the run early.
        """
        self.eval_curve.append((step, loss))
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.num_without_gain = loss, step, 0
            return True
        self.num_without_gain += 1
        self.stopped_early = patience is not None and self.num_without_gain >= patience
        return False


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a finished run: the weights of `step`, and their evaluation if rows were held out.

    If the run was evaluated during training, `step` is the evaluated step with the lowest held-out loss.
    """

    weights: LoraWeights | None  # None: full fine-tuning, whose weights are `tuned_base`'s
    tuned_base: BaseModel | None
    step: int
    num_steps: int
    num_trainable: int
    base: Evaluation | None
    tuned: Evaluation | None
    counters: Counters
    epochs: float


class Run:
    """One attempt at a job. `start` is the adapter that the job continues, if the job names one.

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
        exact_match: ExactMatch,
        *,
        start: LoraWeights | None = None,
        library: ctypes.CDLL | None = None,
        peak_memory: Callable[[], int] = lambda: 0,
    ) -> None:
        self._spec = spec
        self._data = data
        self._base = base
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._exact_match = exact_match
        self._peak_memory = peak_memory
        self._library = library
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
        if self._counters.base is None and self._data.validation is not None:
            self._counters.base = base = self._measure(self._untouched(), None)
            if not base.is_finite:
                raise LossNotFinite(
                    "the untouched base's loss on the held-out rows is not a number: its weights are damaged, or "
                    "too large for its dtype; set SMOLORA_DTYPE=fp32 or another SMOLORA_MODEL, and submit again"
                )
        try:
            self._report_step()
            while self._trainer.step < self._trainer.total_steps and not self._counters.stopped_early:
                self._step()
        except BaseException:
            self._trainable.end_step()
            raise
        return self._finish()

    def checkpoint(self) -> None:
        """Store a checkpoint of the last optimizer step."""
        trainer, counters = self._trainer, self._counters
        self._note_time()
        tensors = dict(trainer.state())
        if self._best is not None:
            tensors["best"] = self._best
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
    def _longest(self) -> int:
        """The number of positions that the model needs."""
        return self._spec.training.max_length

    @property
    def _max_checkpoint_bytes(self) -> int:
        """The maximum size of a checkpoint: masters, AdamW's two moments and the best masters, in fp32."""
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

    def _untouched(self) -> Pass:
        """Return a pass that measures the base alone, computed in the same way as the trainable."""
        nothing = LoraWeights({})
        return trainable_rows(
            self._base, nothing, None, max_length=self._longest, dropout=0.0, library=self._library
        ).passes

    def _go_on_from_checkpoint(self) -> None:
        with self._reporter.transferring(self._max_checkpoint_bytes):
            found = self._checkpoints.newest()
        if found is None:
            return
        tensors = dict(found.tensors)
        best = tensors.pop("best", None)
        self._best = None if best is None else best.to(self._base.device)
        self._trainer.restore(tensors, found.step)
        self._counters = read_document(Counters, found.state)

    def _note_who_computes(self) -> None:
        """Record which code computes this attempt's steps.

        If attempts used different code, the result has other bytes than with one of them alone, and the model card
        lists all.
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
        """Evaluate the last step's weights if due, and report the step, unless that has been done.

        If an attempt ends halfway through this, the next attempt repeats all of it.
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
        loss = self._held_out_loss() if self._is_evaluation_due() else None
        if loss is not None:
            data["eval_loss"] = loss
            message += f", held-out {loss:.4f}"
        self._reporter.metrics(message, data)
        if loss is not None and counters.note_held_out(
            result.step, loss, self._spec.training.early_stopping_patience
        ):
            self._best = self._trainable.masters.clone()
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

    def _held_out_loss(self) -> float:
        found = self._evaluate(self._trainable.passes)
        self._check_finite(found)
        return found.loss

    def _is_checkpoint_due(self) -> bool:
        every = self._spec.training.checkpoint_steps
        if every is not None:
            return self._trainer.step % every == 0
        return time.monotonic() - self._last_checkpoint >= CHECKPOINT_SECONDS

    def _finish(self) -> Outcome:
        self.checkpoint()  # the next attempt repeats only what follows
        trainable = self._trainable
        step = self._trainer.step
        if self._best is not None:
            trainable.masters.copy_(self._best)
            trainable.refresh()
            step = self._counters.best_step
        weights = trainable.rows.weights() if isinstance(trainable, TrainableRows) else None
        tuned_base = trainable.tuned(self._base) if isinstance(trainable, TrainableModel) else None
        tuned = None
        if self._data.validation is not None:
            tuned = self._measure(trainable.passes, weights, tuned_base)
            self._check_finite(tuned)
        if not bool(trainable.masters.isfinite().all()):  # without held-out rows, no loss has revealed it
            raise TrainingDiverged.found(f"the weights are not finite after step {step}", self._spec.training)
        self._note_time()
        counters = self._counters
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
        )

    def _measure(
        self, passes: Pass, weights: LoraWeights | None, tuned_base: BaseModel | None = None
    ) -> Evaluation:
        """Measure loss, accuracy and, if the loss is finite, exact match on the held-out rows."""
        found = self._evaluate(passes)
        if not found.is_finite:
            return found
        matched = self._exact_match(
            tuned_base or self._base, weights, self._data.references, self._reporter.yield_or_leave
        )
        return replace(found, exact_match=matched)

    def _evaluate(self, passes: Pass) -> Evaluation:
        """Measure loss and accuracy on the held-out rows."""
        assert self._data.validation is not None, "an evaluation without held-out rows"
        reporter = self._reporter
        return evaluate(
            passes, self._data.validation, yield_or_leave=reporter.yield_or_leave, computing=reporter.computing
        )

    def _check_finite(self, found: Evaluation) -> None:
        if not found.is_finite:
            what = f"the held-out loss is not a number after step {self._trainer.step}"
            raise TrainingDiverged.found(what, self._spec.training)

    def _note_time(self) -> None:
        now = time.monotonic()
        self._counters.wall_seconds += now - self._started
        self._started = now
        self._counters.peak_memory_bytes = max(self._counters.peak_memory_bytes, self._peak_memory())
