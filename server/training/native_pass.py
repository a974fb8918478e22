"""Training passes as native calls, in the place of torch's forward and autograd."""

import ctypes
from collections.abc import Mapping

import torch

from server.model.base.weights import BaseModel
from server.model.native.abi import ROW_UNIT
from server.model.native.library import computed_by
from server.model.native.training import NativeGroup, NativeRows, NativeTraining
from server.training.passes import Measured, MicroBatch
from server.training.trained_rows import TrainedGroup, TrainedRows


class NativePass:
    """`torch_pass.Pass` of one base and of rows in units of `ROW_UNIT`, whose leaves are read where they lie.

    Where the base is trained itself, there are no rows, and the gradients of its weights are added to `d_weights`.
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
        """Raises NativeUnavailable for a base that native code doesn't cover, and MemoryError."""
        self.computed_by = computed_by(library)
        self._rows = rows
        self._groups = {key: _native(group) for key, group in rows.groups.items()}
        self._training = NativeTraining(
            library,
            base.config,
            base.weights,
            self._groups,
            max_positions=max_length,
            num_threads=torch.get_num_threads(),
            gradients=rows.gradients,
            d_weights=d_weights,
        )

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        """Add `factor` times the gradients of the batch's summed loss to those of what is trained; that loss."""
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
        return Measured(losses.tolist(), int((likeliest == targets).sum()))

    def forward(self, batch: MicroBatch, *, has_backward: bool = True) -> torch.Tensor:
        """Final hidden states (tokens, hidden). Where no gradients are asked for, nothing is kept for them."""
        kept, factor = None, 1.0
        dropout = self._rows.dropout
        if dropout is not None:
            factor = dropout.factor
            kept = {
                (layer, name): dropout.kept(layer, name, group.a) for (layer, name), group in self._groups.items()
            }
        return self._training.forward(
            torch.tensor(batch.token_ids, dtype=torch.int64),
            batch.lengths,
            kept,
            factor,
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
            repeats=1 if module.start is None else 2,  # A lies in A - A₀ as well
        )
        for module in group.modules
    ]
    return NativeGroup(group.a.detach(), group.b.detach(), modules)
