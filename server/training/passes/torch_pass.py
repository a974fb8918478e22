"""Forward, loss and backward of a micro-batch: the protocol of all passes, and the pass in torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from server.model.device import ints_beside
from server.model.gpu import torch_on
from server.model.smollm import Adapters, SmolLM
from server.training.passes.loss import CHUNK, cross_entropy_sum
from server.training.passes.micro_batch import MicroBatch
from server.training.passes.packed_attention import PackedAttention


@dataclass(frozen=True)
class Measured:
    """What a model makes of the targets of a micro-batch."""

    losses: Sequence[float]  # nats, of each
    num_right: int  # that are the likeliest token


class Pass(Protocol):
    """Computes gradients and losses of what is trained. `TorchPass` is the oracle of the others."""

    @property
    def computed_by(self) -> str:
        """The code that does it: equal ones make equal bytes on the same machine."""
        ...

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Final hidden states (tokens, hidden)."""
        ...

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        """Add `factor` times the gradients of the batch's summed loss to `gradients`; that loss, in nats."""
        ...

    def measure(self, batch: MicroBatch) -> Measured:
        """Losses alone."""
        ...


class TorchPass:
    """By torch's autograd, on any device. `collect` takes what a backward pass left in the leaves."""

    def __init__(self, model: SmolLM, adapters: Adapters, collect: Callable[[], None]) -> None:
        self._model = model
        self._adapters = adapters
        self._collect = collect

    @property
    def computed_by(self) -> str:
        return torch_on(self._model.device)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        model = self._model
        attention = PackedAttention(batch.lengths, model.device)
        return model.forward(
            ints_beside(model.embed, batch.token_ids), attention.positions, attention, self._adapters
        )

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        hidden = self.forward(batch)
        loss = cross_entropy_sum(
            hidden.index_select(0, ints_beside(hidden, batch.before)),
            self._model.lm_head.weight,
            ints_beside(hidden, batch.targets),
        )
        torch.autograd.backward(loss * factor)
        self._collect()
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, batch: MicroBatch) -> Measured:
        hidden = self.forward(batch)
        hidden = hidden.index_select(0, ints_beside(hidden, batch.before))  # (targets, hidden)
        targets = ints_beside(hidden, batch.targets)
        losses, are_right = [], []
        for rows, chosen in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = self._model.logits(rows)  # (chunk, vocab), fp32
            losses.append(F.cross_entropy(logits, chosen, reduction="none"))
            are_right.append((logits.argmax(-1) == chosen).sum())
        return Measured(torch.cat(losses).tolist(), int(torch.stack(are_right).sum()))
