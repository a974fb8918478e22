"""The training loop's arithmetic: a step's rows and micro-batches, the learning rate, and AdamW.

The rows and dropout masks of a step depend only on (seed, epoch, step). So a run that resumes from a checkpoint
ends in the same bytes as an uninterrupted run, and no state of a random generator is stored. A step's rows are
packed into micro-batches by length. The loss is the mean over the step's target tokens, however the rows are
packed. The callers handle jobs, checkpoint files and evaluation.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch.optim.adamw import adamw

from adapters.errors import SmoloraError
from server.training.encoding import Example
from server.training.passes import MicroBatch
from server.training.spec import Schedule, TrainingSpec

BETAS, EPSILON = (0.9, 0.999), 1e-8


class TrainingDiverged(SmoloraError):
    """The loss, a gradient or a weight isn't a finite number, so the run has no useful result."""

    @classmethod
    def found(cls, what: str, spec: TrainingSpec) -> Self:
        """Return an error whose message says `what` and advises which settings to change."""
        return cls(
            f"{what}: lower training.learning_rate (now {spec.learning_rate:g}) or raise training.warmup_ratio"
        )


class Trainable(Protocol):
    """Parameters in training.

    `masters` are the fp32 weights and `gradients` their gradients, both flat. The model reads copies of `masters`.
    """

    @property
    def masters(self) -> torch.Tensor: ...
    @property
    def gradients(self) -> torch.Tensor: ...
    @property
    def undecayed(self) -> Sequence[slice]:
        """The slices of `masters` that have no weight decay, in order."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens a micro-batch of several examples may have."""
        ...

    @property
    def has_own_threads(self) -> bool:
        """Whether passes run in native threads, so that torch needs only one thread."""
        ...

    def refresh(self) -> None:
        """Copy `masters` to the tensors that the forward pass reads."""
        ...

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        """Add `factor` times the gradients of the batch's summed loss to `gradients`; return the loss (nats)."""
        ...

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare dropout for a forward pass over these training rows, which have `lengths` tokens."""
        ...

    def end_step(self) -> None:
        """Turn dropout off until the next micro-batch."""
        ...


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step. `loss` is in nats per target token, with the weights before the step."""

    step: int  # counted from 1
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    num_tokens: int  # non-padding inputs
    seconds: float


class Trainer:
    """Trains `trainable` on encoded rows, by AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def __init__(self, trainable: Trainable, examples: Sequence[Example], spec: TrainingSpec) -> None:
        if not examples:
            raise ValueError("there are no rows to train on")
        self.trainable = trainable
        self.spec = spec
        self.step = 0  # optimizer steps done
        self.total_steps = spec.total_steps(len(examples))
        self._examples = examples
        self._order: tuple[int, list[int]] = (-1, [])
        self._mean = torch.zeros_like(trainable.masters)
        self._square = torch.zeros_like(trainable.masters)
        self._stretches = _by_decay(trainable, spec.weight_decay)

    @property
    def epoch(self) -> float:
        """The number of passes over the data so far, such as 1.5."""
        return self.step / self._steps_per_epoch

    def run_step(
        self,
        yield_or_leave: Callable[[], None] = lambda: None,
        computing: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> StepResult:
        """Run one optimizer step. Raise TrainingDiverged if the loss or a gradient isn't finite.

        `yield_or_leave` is called before each micro-batch; if it raises, no weight has changed. Each
        micro-batch runs within the context manager `computing(number of tokens)`.
        """
        with _one_torch_thread() if self.trainable.has_own_threads else nullcontext():
            return self._run_step(yield_or_leave, computing)

    def _run_step(
        self, yield_or_leave: Callable[[], None], computing: Callable[[int], AbstractContextManager[object]]
    ) -> StepResult:
        started = time.perf_counter()
        rows = self._rows(self.step)
        num_targets = sum(sum(self._examples[row].is_target) for row in rows)
        num_tokens = self._num_tokens(rows)
        self.trainable.gradients.zero_()
        loss = 0.0
        paused = 0.0
        for micro_batch in self._micro_batches(rows):
            before = time.perf_counter()
            yield_or_leave()
            paused += time.perf_counter() - before
            with computing(self._num_tokens(micro_batch)):
                loss += self._backward(micro_batch, num_targets)
        self.trainable.end_step()
        rate = learning_rate(
            self.step, self.total_steps, self.spec.learning_rate, self.spec.schedule, self.spec.warmup_ratio
        )
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged.found(f"the loss is not a number in step {self.step + 1}", self.spec)
        self._update(rate)
        self.step += 1
        self.trainable.refresh()
        return StepResult(self.step, loss, rate, norm, num_tokens, time.perf_counter() - started - paused)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors to store in a checkpoint: fp32 weights and AdamW's moments. The tensors aren't
        copies.
        """
        return {"masters": self.trainable.masters, "mean": self._mean, "square": self._square}

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Resume from tensors that `state` returned after `step` optimizer steps."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.step = step
        self.trainable.refresh()

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self.spec.batch_size)

    def _rows(self, step: int) -> list[int]:
        """Return the rows of one optimizer step, in the shuffled order of its epoch."""
        epoch, place = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self._examples), self.spec.seed, epoch))
        return self._order[1][place * self.spec.batch_size : (place + 1) * self.spec.batch_size]

    def _num_tokens(self, rows: Sequence[int]) -> int:
        return sum(len(self._examples[row].token_ids) for row in rows)

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Split a step's rows into micro-batches, and yield the rows of each."""
        lengths = [len(self._examples[row].token_ids) for row in rows]
        bins = pack(lengths, self.trainable.max_tokens) if self.spec.packing else [[i] for i in range(len(rows))]
        for members in bins:
            yield [rows[i] for i in members]

    def _backward(self, rows: Sequence[int], num_targets: int) -> float:
        """Run one micro-batch forward and backward, and return its share of the step's loss."""
        batch = MicroBatch.of([self._examples[row] for row in rows])
        self.trainable.begin_micro_batch(self.spec.seed, self.step, rows, batch.lengths)
        return self.trainable.accumulate(batch, 1 / num_targets) / num_targets

    def _clip(self) -> float:
        """Scale the gradients to a norm of at most `max_grad_norm`. Return the norm before scaling."""
        gradients = self.trainable.gradients
        norm = float(gradients.norm())
        if norm > self.spec.max_grad_norm:
            gradients.mul_(self.spec.max_grad_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        """Apply AdamW in one pass over memory.

        torch's function is called directly: its optimizer class imports torch's compiler, which takes half a
        second.
        """
        masters, gradients = self.trainable.masters, self.trainable.gradients
        for decay, stretches in self._stretches:
            adamw(
                [masters[stretch] for stretch in stretches],
                [gradients[stretch] for stretch in stretches],
                [self._mean[stretch] for stretch in stretches],
                [self._square[stretch] for stretch in stretches],
                [],
                [torch.full((), float(self.step), device=masters.device) for _ in stretches],
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=decay,
                eps=EPSILON,
                maximize=False,
            )


def _by_decay(trainable: Trainable, decay: float) -> list[tuple[float, list[slice]]]:
    """Split all fp32 weights by their weight decay, and return pairs (weight decay, slices of `masters`)."""
    undecayed = list(trainable.undecayed)
    if not undecayed or not decay:
        return [(decay, [slice(None)])]
    ends = [0, *(end for stretch in undecayed for end in (stretch.start, stretch.stop)), len(trainable.masters)]
    between = [slice(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=True) if start < stop]
    return [(decay, between), (0.0, undecayed)]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread during the block: torch's idle threads would spin on cores that are needed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shuffled(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the rows in an epoch, as shuffled indices."""
    order = list(range(num_rows))
    random.Random(f"smolora/{seed}/{epoch}").shuffle(order)
    return order


def learning_rate(step: int, total_steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, of `total_steps`.

    It rises linearly to `peak` over the warm-up of ceil(warmup_ratio · total_steps) steps, starting above 0. Then
    it stays constant, or falls to 0 at the end of the last step: linearly, or by half a cosine (Loshchilov &
    Hutter 2017, arXiv:1608.03983).
    """
    num_warmup = math.ceil(warmup_ratio * total_steps - 1e-9)  # in binary, 0.07 · 100 is above 7
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, total_steps - num_warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * (1 + math.cos(math.pi * done)) / 2


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack `lengths` into bins of at most `capacity`. Return each bin's indices; a longer item has its own bin.

    The method is first-fit decreasing: longest first, equal lengths in their order, each into the first bin with
    room. It takes O(n log n) time, and at most 11/9 of the minimum number of bins, plus 6/9 (Dósa 2007). Lengths
    and capacity must be at least 1.
    """
    assert capacity >= 1, "a bin must hold something"
    assert min(lengths, default=1) >= 1, "every row has a token"
    bins: list[list[int]] = []
    room = _Room(len(lengths), capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        needed = min(lengths[index], capacity)
        place = room.take_first(needed)
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
    return bins


class _Room:
    """The room left in each of `num_bins` bins: a tree of maxima that finds the first bin with enough room."""

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._first_leaf = 1 << max(0, num_bins - 1).bit_length()
        self._most = [capacity] * (2 * self._first_leaf)  # the maximum of node i, whose children are 2i and 2i + 1

    def take_first(self, needed: int) -> int:
        """Take `needed` from the first bin with enough room, and return the bin's index.

        Call this only if a bin has enough room.
        """
        node = 1
        while node < self._first_leaf:
            node = 2 * node + (self._most[2 * node] < needed)
        assert self._most[node] >= needed, "as many bins as rows, and a row fits an empty bin"
        self._most[node] -= needed
        found = node - self._first_leaf
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return found
