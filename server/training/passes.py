"""The forward pass, loss and backward pass of a micro-batch, in torch (any device) and in native code.

A micro-batch is a flat batch of whole examples, one after the other. Each example attends causally to itself alone
(a block-diagonal mask), and its positions start at 0. So its loss doesn't depend on the other examples.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from server.model.base.config import ModelConfig
from server.model.base.weights import BaseModel
from server.model.device import ints_on, torch_on
from server.model.native.abi import ROW_UNIT
from server.model.native.library import computed_by
from server.model.native.training import NativeDropout, NativeGroup, NativeRows, NativeTraining
from server.model.ops.gradients import apply
from server.model.smollm import Adapters, SmolLM
from server.training.encoding import Example
from server.training.packed import PackedAttention
from server.training.trained_rows import TrainedGroup, TrainedRows
from server.training.varlen import attention_for

CHUNK = 256
"""The number of tokens whose logits are in memory at one time."""


MIN_GPU_TOKENS, MAX_GPU_TOKENS = 4096, 16_384
"""The limits of a micro-batch of several examples on a GPU."""


def max_tokens(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens a micro-batch of several examples may have. A higher limit saves no time.

    On a GPU, the activations may take half of the memory that this process may use. This depends on the card and
    the settings alone, so that a job that continues has the same micro-batches.
    """
    if device.type == "cpu":
        return 512
    _, total = torch.cuda.mem_get_info(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    fitting = int(allowed / 2 / activation_bytes(config, dtype)) // 1024 * 1024
    return min(max(fitting, MIN_GPU_TOKENS), MAX_GPU_TOKENS)


def activation_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's activations that `TorchPass` keeps for the backward pass, at most.

    They are the inputs of the norms, the products and the gate, and attention's queries, keys and values.
    """
    attention = 3 * config.q_size + 4 * config.kv_size
    width = 6 * config.hidden_size + attention + 3 * config.intermediate_size
    return dtype.itemsize * (config.num_layers * width + 3 * config.hidden_size)


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of some examples, one example after the other, and which of them are predicted.

    `targets[i]` is predicted from the hidden state at `before[i]`, the position before it.
    """

    token_ids: Sequence[int]
    lengths: Sequence[int]  # of the examples
    before: Sequence[int]  # positions in token_ids, all different
    targets: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        before: list[int] = []
        targets: list[int] = []
        start = 0
        for example in examples:
            for place in range(1, len(example.token_ids)):
                if example.is_target[place]:
                    before.append(start + place - 1)
                    targets.append(example.token_ids[place])
            start += len(example.token_ids)
        token_ids = [token for example in examples for token in example.token_ids]
        return cls(token_ids, [len(example.token_ids) for example in examples], before, targets)


@dataclass(frozen=True)
class Measured:
    """A model's results on the targets of a micro-batch."""

    losses: Sequence[float]  # nats, one for each target
    are_right: Sequence[bool]  # whether the model finds the target the likeliest token


class Pass(Protocol):
    """Computes gradients and losses in training. Tests compare other implementations with `TorchPass`."""

    @property
    def computed_by(self) -> str:
        """A description of the code that computes. Equal code gives equal bytes on the same machine."""
        ...

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states (tokens, hidden size) after the last norm."""
        ...

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        """Add `factor` times the gradients of the batch's summed loss to the trained parameters' gradients.

        Return the summed loss in nats.
        """
        ...

    def measure(self, batch: MicroBatch) -> Measured:
        """Return the targets' losses, and which are predicted right, without computing gradients."""
        ...


class TorchPass:
    """A pass by torch's autograd, on any device.

    `collect` is called after each backward pass. It must add up and reset the gradients of the leaf tensors.
    """

    def __init__(self, model: SmolLM, adapters: Adapters, collect: Callable[[], None]) -> None:
        self._model = model
        self._adapters = adapters
        self._collect = collect
        self._attention = attention_for(model.config, model.dtype, model.device)

    @property
    def computed_by(self) -> str:
        flash = "" if self._attention is PackedAttention else " with FlashAttention"
        return torch_on(self._model.device) + flash

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        model = self._model
        attention = self._attention(batch.lengths, model.device)
        return model.forward(ints_on(model.embed, batch.token_ids), attention.positions, attention, self._adapters)

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        hidden = self.forward(batch)
        loss = cross_entropy_sum(
            hidden.index_select(0, ints_on(hidden, batch.before)),
            self._model.lm_head.weight,
            ints_on(hidden, batch.targets),
        )
        torch.autograd.backward(loss * factor)
        self._collect()
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, batch: MicroBatch) -> Measured:
        hidden = self.forward(batch)
        hidden = hidden.index_select(0, ints_on(hidden, batch.before))  # (targets, hidden)
        targets = ints_on(hidden, batch.targets)
        losses, are_right = [], []
        for rows, chosen in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = self._model.logits(rows)  # (chunk, vocab), fp32
            losses.append(F.cross_entropy(logits, chosen, reduction="none"))
            are_right.append(logits.argmax(-1) == chosen)
        return Measured(torch.cat(losses).tolist(), torch.cat(are_right).tolist())


class NativePass:
    """A pass in native code. `rows` is the adapter in training, whose tensors are read without being copied.

    Create `rows` with `row_unit=ROW_UNIT`. In full fine-tuning it has no modules, and the gradients of the base's
    weights are added to `d_weights`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        base: BaseModel,
        rows: TrainedRows,
        *,
        max_length: int,
        d_weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Raise NativeUnavailable if native code doesn't support the base, and MemoryError if memory runs out."""
        self.computed_by = computed_by(library)
        self._rows = rows
        self._training = NativeTraining(
            library,
            base.config,
            base.weights,
            {key: _native(group) for key, group in rows.groups.items()},
            max_positions=max_length,
            num_threads=torch.get_num_threads(),
            gradients=rows.gradients,
            d_weights=d_weights,
        )

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        hidden = self.forward(batch)
        before = torch.tensor(batch.before, dtype=torch.int64)
        loss, d_rows = self._training.loss(hidden[before], torch.tensor(batch.targets, dtype=torch.int64), factor)
        self._training.backward(torch.zeros_like(hidden).index_copy_(0, before, d_rows))
        self._rows.dropout = None
        return loss

    def measure(self, batch: MicroBatch) -> Measured:
        hidden = self.forward(batch, has_backward=False)
        targets = torch.tensor(batch.targets, dtype=torch.int64)
        losses, likeliest = self._training.measure(hidden[torch.tensor(batch.before, dtype=torch.int64)], targets)
        return Measured(losses.tolist(), (likeliest == targets).tolist())

    def forward(self, batch: MicroBatch, *, has_backward: bool = True) -> torch.Tensor:
        """Return the hidden states (tokens, hidden size) after the last norm.

        If `has_backward`, the values that the backward pass needs are kept.
        """
        dropout = self._rows.dropout
        return self._training.forward(
            torch.tensor(batch.token_ids, dtype=torch.int64),
            batch.lengths,
            None if dropout is None else NativeDropout(dropout.keys, dropout.num_dropped, dropout.factor),
            has_backward=has_backward,
        )


def _native(group: TrainedGroup) -> NativeGroup:
    modules = [
        NativeRows(
            module.rows.start,
            -(-(module.rows.stop - module.rows.start) // ROW_UNIT) * ROW_UNIT,
            module.features.start,
            module.features.stop - module.features.start,
            module.a.shape[0],
            int(module.d_a.storage_offset()),
            int(module.d_b.storage_offset()),
            module.scaling,
            repeats=1 if module.start is None else 2,  # the rows are [A; A - A₀]
        )
        for module in group.modules
    ]
    return NativeGroup(group.a.detach(), group.b.detach(), modules)


def cross_entropy_sum(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy (nats, an fp32 scalar) of targets (tokens,) under softmax(hidden · headᵀ).

    The shapes are hidden (tokens, hidden size) and head (vocab, hidden size). The result is differentiable once,
    in hidden and head.

    Logits of a vocabulary of 49,152 take 200 KB per token in fp32. Logits and their gradients are computed for
    `CHUNK` tokens at a time, so that the backward pass needs only a tensor of the size of `hidden`.
    """
    return apply(_CrossEntropySum, hidden, head, targets)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            log_probs = F.linear(hidden[rows], head).float().log_softmax(-1)  # (chunk, vocab)
            chosen = targets[rows, None]
            loss -= log_probs.gather(1, chosen).sum()
            d_logits = log_probs.exp_()
            d_logits.scatter_add_(1, chosen, d_logits.new_full(chosen.shape, -1.0))  # softmax - one-hot
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.t() @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # noqa: ANN401
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), None if d_head is None else d_head * d_loss, None
