"""An adapter's training passes as two native calls, in the place of torch's forward and autograd."""

import ctypes
from collections.abc import Sequence

import torch

from server.model.native.training import ROW_UNIT, NativeGroup, NativeRows, NativeTraining
from server.model.weights import BaseModel
from server.training.trained_rows import TrainedGroup, TrainedRows


class NativePass:
    """The passes of one base and of rows in units of `ROW_UNIT`, whose leaves are read where they lie."""

    def __init__(self, library: ctypes.CDLL, base: BaseModel, rows: TrainedRows, *, max_length: int) -> None:
        """Raises NativeUnavailable for a base that the native code does not cover."""
        self._rows = rows
        self._groups = {key: _native(group) for key, group in rows.groups.items()}
        self._hidden: torch.Tensor | None = None
        self._training = NativeTraining(
            library,
            base.config,
            base.weights,
            self._groups,
            max_positions=max_length,
            num_threads=torch.get_num_threads(),
        )

    def forward(self, token_ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Final hidden states (tokens, hidden): a leaf, whose gradient `backward` takes."""
        kept, factor = None, 1.0
        dropout = self._rows.dropout
        if dropout is not None:
            factor = dropout.factor
            kept = {
                (layer, name): dropout.kept(layer, name, group.a.new_empty(0, group.a.shape[1]))
                for (layer, name), group in self._groups.items()
            }
        self._hidden = self._training.forward(token_ids, lengths, kept, factor).requires_grad_()
        return self._hidden

    def backward(self) -> None:
        """Add the gradients to those of the rows."""
        assert self._hidden is not None, "no forward pass"
        assert self._hidden.grad is not None, "no gradient has come back"
        self._training.backward(self._hidden.grad)
        self._hidden = None
        self._rows.add_gradients({key: (group.d_a, group.d_b) for key, group in self._groups.items()})


def _native(group: TrainedGroup) -> NativeGroup:
    modules = [
        NativeRows(
            module.rows.start,
            -(-(module.rows.stop - module.rows.start) // ROW_UNIT) * ROW_UNIT,
            module.features.start,
            module.features.stop - module.features.start,
        )
        for module in group.modules
    ]
    a, b = group.a.detach(), group.b.detach()
    d_a, d_b = (torch.zeros(leaf.shape, dtype=torch.float32) for leaf in (a, b))
    return NativeGroup(a, b, modules, d_a, d_b)
