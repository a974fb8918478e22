"""What a run counts on its way, and what it leaves."""

from dataclasses import dataclass, field

from adapters.lora import LoraWeights
from server.model.weights import BaseModel
from server.training.evaluate import Evaluation


@dataclass
class Counters:
    """What a run has counted so far; part of each checkpoint."""

    num_tokens: int = 0
    timed_tokens: int = 0  # those of all steps but each attempt's first, and the seconds inside them
    timed_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    best_loss: float | None = None
    best_step: int = 0
    num_without_gain: int = 0  # evaluations since the best one
    stopped_early: bool = False
    computed_by: list[str] = field(
        default_factory=list
    )  # steps: "torch", or native source's digest and its compiler; more if changed
    base: Evaluation | None = None  # the untouched base's
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    eval_curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0


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
