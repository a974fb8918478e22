"""Forward, loss and backward of a micro-batch: the protocol of all passes, and the pass in torch."""

from collections.abc import Callable
from typing import Protocol

import torch

from server.model.device import ints_beside
from server.model.gpu import torch_on
from server.model.smollm import Adapters, SmolLM
from server.training.passes.loss import cross_entropy_sum
from server.training.passes.micro_batch import MicroBatch
from server.training.passes.packed_attention import PackedAttention


class Pass(Protocol):
    """Computes gradients of what is trained. `TorchPass` is the oracle of the others."""

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
