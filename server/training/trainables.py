"""The implementations of `trainer.Trainable`: a LoRA adapter, and every weight of a copy of the base."""

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from adapters.lora import LoraWeights
from server.model.base.weights import LAYER_TENSORS, BaseModel, BaseWeights, LayerWeights
from server.model.native.abi import ROW_UNIT
from server.model.smollm import Adapters, NoAdapters, SmolLM
from server.training.dropout import Dropout
from server.training.passes import MicroBatch, NativePass, Pass, TorchPass, max_tokens
from server.training.trained_rows import TrainedRows


class TrainableRows:
    """A LoRA adapter in training on a frozen base. `passes` computes gradients and losses; None selects torch."""

    def __init__(
        self, base: BaseModel, rows: TrainedRows, *, max_length: int, dropout: float, passes: Pass | None = None
    ) -> None:
        self.rows = rows
        self.model = SmolLM(base.config, base.weights, max_positions=max_length)
        self.max_tokens = max_tokens(base.config, base.dtype, base.device)
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

    @property
    def undecayed(self) -> Sequence[slice]:
        return ()

    @property
    def has_own_threads(self) -> bool:
        return isinstance(self.passes, NativePass)

    def refresh(self) -> None:
        self.rows.refresh()

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        return self.passes.accumulate(batch, factor)

    def collect_gradients(self) -> None:
        self.rows.collect_gradients()

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        if self._dropout:
            self.rows.dropout = Dropout(self._dropout, [(seed, step, row) for row in rows], lengths)

    def end_step(self) -> None:
        self.rows.dropout = None


def trainable_rows(
    base: BaseModel,
    start: LoraWeights,
    subtracted: LoraWeights | None,
    *,
    max_length: int,
    dropout: float,
    library: ctypes.CDLL | None = None,
) -> TrainableRows:
    """Return an adapter that begins as `start` minus `subtracted`. Native code trains it if `library` is given."""
    row_unit = 1 if library is None else ROW_UNIT
    rows = TrainedRows(start, base.config.shape, base.dtype, base.device, subtracted, row_unit=row_unit)
    passes = None if library is None else NativePass(library, base, rows, max_length=max_length)
    return TrainableRows(base, rows, max_length=max_length, dropout=dropout, passes=passes)


class TrainableModel:
    """Full fine-tuning: every weight of a private copy of the base, in the base's dtype.

    `masters` are the same weights in fp32, which the optimizer updates. Native code trains the copy if `library`
    is given.
    """

    def __init__(self, base: BaseModel, *, max_length: int, library: ctypes.CDLL | None = None) -> None:
        self._copies = torch.cat([tensor.flatten() for _, tensor in base.weights.tensors()])
        self.weights = _views(base.weights, self._copies)
        self.model = SmolLM(base.config, self.weights, max_positions=max_length)
        self.max_tokens = max_tokens(base.config, base.dtype, base.device)
        self.adapters: Adapters = NoAdapters()
        self.masters = self._copies.float()
        self.gradients = torch.zeros_like(self.masters)
        self._leaves = dict(self.weights.tensors())
        self._d_leaves = dict(_views(base.weights, self.gradients).tensors())
        self.passes = self._torch_pass() if library is None else self._native_pass(library, base, max_length)

    @property
    def undecayed(self) -> Sequence[slice]:
        """The slices of `masters` with the norms' gains, which aren't decayed, as in transformers' Trainer."""
        stretches, end = [], 0
        for name, tensor in self.weights.tensors():
            start, end = end, end + tensor.numel()
            if name.endswith("norm"):
                stretches.append(slice(start, end))
        return stretches

    @property
    def has_own_threads(self) -> bool:
        return False  # every weight is updated by torch

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        return self.passes.accumulate(batch, factor)

    def refresh(self) -> None:
        self._copies.copy_(self.masters)

    def begin_micro_batch(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Do nothing: full fine-tuning has no dropout."""

    def end_step(self) -> None:
        """Do nothing: full fine-tuning has no dropout."""

    def tuned(self, base: BaseModel) -> BaseModel:
        """Return the fine-tuned model: the base with the current weights, which aren't copied."""
        return dataclasses.replace(base, weights=self.weights)

    def _torch_pass(self) -> Pass:
        for leaf in self._leaves.values():
            leaf.requires_grad_()
        return TorchPass(self.model, self.adapters, self._collect_gradients)

    def _native_pass(self, library: ctypes.CDLL, base: BaseModel, max_length: int) -> Pass:
        no_rows = TrainedRows(LoraWeights({}), base.config.shape, base.dtype, base.device)
        return NativePass(library, self.tuned(base), no_rows, max_length=max_length, d_weights=self._d_leaves)

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Add the leaf tensors' gradients to `gradients`, and reset the leaves' own gradients."""
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._d_leaves[name] += leaf.grad
                leaf.grad = None


def _views(weights: BaseWeights, flat: torch.Tensor) -> BaseWeights:
    """Return views of `flat`, in order, with the names and shapes of `weights`. A tied output head stays tied."""
    sizes = [tensor.numel() for _, tensor in weights.tensors()]
    found = {
        name: piece.view(tensor.shape)
        for (name, tensor), piece in zip(weights.tensors(), torch.split(flat, sizes), strict=True)
    }
    layers = tuple(
        LayerWeights(*(found[f"layers.{index}.{name}"] for name in LAYER_TENSORS))
        for index in range(len(weights.layers))
    )
    return BaseWeights(found["embed"], layers, found["final_norm"], found.get("lm_head", found["embed"]))
