"""The two things that can be trained: an adapter's rows beside the frozen base, and every weight of a copy of it.

Both look the same to `trainer.Trainer`: flat fp32 masters, flat fp32 gradients, and a model to run.
"""

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from adapters.lora import LoraWeights
from server.model.base.weights import LAYER_TENSORS, BaseModel, BaseWeights, LayerWeights
from server.model.native.abi import ROW_UNIT
from server.model.smollm import Adapters, NoAdapters, SmolLM
from server.training.passes.dropout import Dropout
from server.training.passes.micro_batch import MicroBatch
from server.training.passes.native_pass import NativePass
from server.training.passes.torch_pass import Pass, TorchPass
from server.training.passes.trained_rows import TrainedRows


class TrainableRows:
    """An adapter: the base is read, never written. `passes` computes; torch where it is None."""

    def __init__(
        self, base: BaseModel, rows: TrainedRows, *, max_length: int, dropout: float, passes: Pass | None = None
    ) -> None:
        self.rows = rows
        self.model = SmolLM(base.config, base.weights, max_positions=max_length)
        self.passes: Pass = TorchPass(self.model, rows, self.collect_gradients) if passes is None else passes
        self._dropout = dropout

    @property
    def adapters(self) -> Adapters:
        return self.rows

    @property
    def masters(self) -> torch.Tensor:
        return self.rows.masters

    @property
    def gradients(self) -> torch.Tensor:
        return self.rows.gradients

    def refresh(self) -> None:
        self.rows.refresh()

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        return self.passes.accumulate(batch, factor)

    def collect_gradients(self) -> None:
        """Add what torch's backward pass left to `gradients`."""
        self.rows.collect_gradients()

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        if self._dropout:
            self.rows.dropout = Dropout(self._dropout, [(seed, step, row) for row in rows], lengths)

    def end_step(self) -> None:
        self.rows.dropout = None


def trainable_rows(
    base: BaseModel,
    start: LoraWeights,
    taken_off: LoraWeights | None,
    *,
    max_length: int,
    dropout: float,
    library: ctypes.CDLL | None = None,
) -> TrainableRows:
    """An adapter that begins as `start`, less `taken_off`; native where `library` is given: see `find_library`."""
    row_unit = 1 if library is None else ROW_UNIT
    rows = TrainedRows(start, base.config.shape, base.dtype, base.device, taken_off, row_unit=row_unit)
    passes = None if library is None else NativePass(library, base, rows, max_length=max_length)
    return TrainableRows(base, rows, max_length=max_length, dropout=dropout, passes=passes)


class TrainableModel:
    """Every weight of a private copy of the base, in its dtype, with fp32 masters: full fine-tuning."""

    def __init__(self, base: BaseModel, *, max_length: int) -> None:
        self.weights = _copy(base.weights)
        self.model = SmolLM(base.config, self.weights, max_positions=max_length)
        self.adapters: Adapters = NoAdapters()
        self._leaves = [tensor for _, tensor in self.weights.tensors()]
        self.masters = torch.cat([leaf.detach().float().flatten() for leaf in self._leaves])
        self.gradients = torch.zeros_like(self.masters)
        self.passes: Pass = TorchPass(self.model, self.adapters, self.collect_gradients)

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        return self.passes.accumulate(batch, factor)

    @torch.no_grad()
    def refresh(self) -> None:
        for leaf, master in zip(self._leaves, self._split(self.masters), strict=True):
            leaf.copy_(master)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add what torch's backward pass left to `gradients`."""
        for leaf, gradient in zip(self._leaves, self._split(self.gradients), strict=True):
            if leaf.grad is not None:
                gradient += leaf.grad
                leaf.grad = None

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Nothing is random here."""

    def end_step(self) -> None:
        """Nothing to put back."""

    def tuned(self, base: BaseModel) -> BaseModel:
        """The base with the weights as they are now (not copies)."""
        return dataclasses.replace(base, weights=self.weights)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = torch.split(flat, [leaf.numel() for leaf in self._leaves])
        return [piece.view(leaf.shape) for piece, leaf in zip(pieces, self._leaves, strict=True)]


def _copy(weights: BaseWeights) -> BaseWeights:
    """Copies of all tensors, as leaves that autograd fills; a tied head stays tied."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_()

    embed = leaf(weights.embed)
    layers = tuple(
        LayerWeights(*(leaf(getattr(layer, name)) for name in LAYER_TENSORS)) for layer in weights.layers
    )
    lm_head = embed if weights.lm_head is weights.embed else leaf(weights.lm_head)
    return BaseWeights(embed, layers, leaf(weights.final_norm), lm_head)
