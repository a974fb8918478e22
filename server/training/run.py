"""What a run counts on its way, and what it leaves.

What a run, or a merge, tells the world while it works.

One job from its data to its adapter: train, evaluate, keep checkpoints, and say what came of it.

`Run` goes on from the newest checkpoint, wherever the last attempt ended, and arrives at the same weights as a run
that nothing disturbed. It talks to the world through `Reporter`; leases, publishing and processes are
`server.jobs.run_job`'s.
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


@dataclass
class Counters:
    """What a run has counted so far; part of each checkpoint."""

    num_tokens: int = 0
    timed_tokens: int = 0  # of the steps that are timed: all but the first of each attempt
    timed_seconds: float = 0.0  # inside those steps
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    best_loss: float | None = None
    best_step: int = 0
    num_without_gain: int = 0  # evaluations since the best one
    stopped_early: bool = False
    computed_by: list[str] = field(default_factory=list)  # "torch" or native source and compiler; more if changed
    base: Evaluation | None = None  # the untouched base's
    unreported: StepResult | None = None  # the last step's, until it is evaluated (where due) and told of
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    eval_curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    @property
    def newest_losses(self) -> dict[str, object]:
        """By the names that `GET /train/{id}` has."""
        found: dict[str, object] = {}
        if self.train_curve:
            found["train_loss"] = self.train_curve[-1][1]
        if self.eval_curve:
            found["eval_loss"] = self.eval_curve[-1][1]
        if self.base is not None:
            found["base_eval_loss"] = self.base.loss
        return found

    def note_held_out(self, step: int, loss: float, patience: int | None) -> bool:
        """Add an evaluation to the curve; whether it is the best so far. `patience` others in a row end it all."""
        self.eval_curve.append((step, loss))
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.num_without_gain = loss, step, 0
            return True
        self.num_without_gain += 1
        self.stopped_early = patience is not None and self.num_without_gain >= patience
        return False


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a finished run leaves: the weights of `step`; what they are worth, where rows were held out.

    With evaluations on the way, `step` is the best one's, of the `num_steps` that were taken.
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


class Reporter(Protocol):
    """Who listens to a run. Any of these may raise to end it; what was checkpointed stays."""

    def yield_or_leave(self) -> None:
        """Called at least once a micro-batch, and a module that is computed: yields to serving, and leaves where
        that is wanted.
        """
        ...

    def transferring(self, num_bytes: int) -> AbstractContextManager[None]:
        """A block that writes or reads so many bytes in calls that can't say how far they are."""
        ...

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        """A block that trains on or measures so many tokens, in calls that can't say how far they are."""
        ...

    def progress(self, progress: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        """How far the run is, after each step."""
        ...

    def metrics(self, message: str, data: Mapping[str, object]) -> None:
        """Measurements of the step `data["step"]`."""
        ...

    def checkpointed(self, step: int) -> None:
        """A checkpoint of that step is on the disk."""
        ...


log = logging.getLogger("smolora.training")

CHECKPOINT_SECONDS = 30.0
"""Between checkpoints, where the job doesn't say after how many steps."""


ExactMatch = Callable[[BaseModel, LoraWeights | None, Sequence[Reference], Callable[[], None]], float | None]
"""The share of references that the base with the weights completes exactly; what is called before each step."""


class Run:
    """One attempt at a job. `start` is the adapter that the job goes on from, where it names one.

    `library` is the native code, where this machine has it and it covers the base. To make one may take
    minutes, in which the reporter may end it as later.
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
        """Train to the end and measure. Raises TrainingDiverged, LossNotFinite, or what the reporter raises."""
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
        """Store where the run is: after its last optimizer step."""
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
        """As `GET /train/{id}` shows it."""
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
        """Positions that the model must know."""
        return self._spec.training.max_length

    @property
    def _max_checkpoint_bytes(self) -> int:
        """Masters, AdamW's two moments and the best masters, in fp32."""
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
        """Measures the base alone, computed as what is trained is."""
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
        """Record what computes this attempt's steps.

        If attempts differ in it, the bytes are neither's alone, and the card lists all of them.
        """
        now, before = self._trainable.passes.computed_by, self._counters.computed_by
        if before and before[-1] != now:
            log.warning("continues with %s what %s began: the bytes won't be those of either", now, before[-1])
        if not before or before[-1] != now:
            before.append(now)

    def _step(self) -> None:
        result = self._trainer.run_step(self._reporter.yield_or_leave, self._reporter.computing)
        self._count(result)
        self._report_step()

    def _report_step(self) -> None:
        """Evaluate the last step's weights where that is due, and tell of the step, unless that has been done.

        An attempt may end in the middle. What it found out by then is dropped, and the next one begins here.
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
        if not self._is_first_step:  # it warms caches up
            counters.timed_tokens += result.num_tokens
            counters.timed_seconds += result.seconds
        self._is_first_step = False
        counters.train_curve.append((result.step, result.loss))
        counters.unreported = result

    def _is_evaluation_due(self) -> bool:
        every, step = self._spec.training.eval_steps, self._trainer.step
        return every is not None and (step % every == 0 or step == self._trainer.total_steps)

    def _held_out_loss(self) -> float:
        """Of the present weights."""
        found = self._evaluate(self._trainable.passes)
        self._check_finite(found)
        return found.loss

    def _is_checkpoint_due(self) -> bool:
        every = self._spec.training.checkpoint_steps
        if every is not None:
            return self._trainer.step % every == 0
        return time.monotonic() - self._last_checkpoint >= CHECKPOINT_SECONDS

    def _finish(self) -> Outcome:
        self.checkpoint()  # so that what follows can be done again
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
        if not bool(trainable.masters.isfinite().all()):  # no loss says so where no rows are held out
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
        """Loss, accuracy and, where the loss is a number, exact match on the held-out rows."""
        found = self._evaluate(passes)
        if not found.is_finite:
            return found
        matched = self._exact_match(
            tuned_base or self._base, weights, self._data.references, self._reporter.yield_or_leave
        )
        return replace(found, exact_match=matched)

    def _evaluate(self, passes: Pass) -> Evaluation:
        """Loss and accuracy on the held-out rows."""
        assert self._data.validation is not None, "an evaluation without held-out rows"
        told = self._reporter
        return evaluate(
            passes, self._data.validation, yield_or_leave=told.yield_or_leave, computing=told.computing
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
