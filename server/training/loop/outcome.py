"""What a run counts on its way, and what it leaves."""

from dataclasses import dataclass, field

from adapters.lora import LoraWeights
from server.model.base.weights import BaseModel
from server.training.loop.evaluate import Evaluation
from server.training.loop.trainer import StepResult


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
