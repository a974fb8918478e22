"""Calls the native forward and backward pass of a training batch: what `train.cpp` reads, laid out.

It does what `SmolLM.forward` does with `PackedAttention` and `TrainedRows`, and what autograd does after it. What
is multiplied is bf16; sums, the residual stream and its gradient are fp32, so that results lie closer to fp32's
than those of torch's bf16 path. They depend neither on the number of threads nor on chance.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from server.model.config import ModelConfig
from server.model.native.base import BaseArguments, check_base
from server.model.ops.norms import rotary_table
from server.model.rank_rows import GROUPS, GroupKey
from server.model.weights import BaseWeights

ROW_UNIT = 16
"""A module's rows in a group's A and B begin at a multiple of it; those that fill it up are zero."""


@dataclass(frozen=True)
class NativeRows:
    """A module's rows in its group."""

    row: int
    num_rows: int  # a multiple of ROW_UNIT
    out_start: int  # of the features that they reach in the group's fused output
    out_features: int


@dataclass(frozen=True, eq=False)
class NativeGroup:
    """One layer's group: bf16 a (rows, in) and b (rows, out), scalings included, and where their gradients go.

    b is zero outside the features of each module's rows, and its gradient isn't written there.
    """

    a: torch.Tensor
    b: torch.Tensor
    modules: Sequence[NativeRows]
    d_a: torch.Tensor  # fp32, like a
    d_b: torch.Tensor


class _Lora(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "d_a", "d_b")),
        ("rows", ctypes.c_int64),
        ("modules", ctypes.c_void_p),
        ("num_modules", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_texts")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "starts", "lora")),
        ("factor", ctypes.c_double),
    )


class NativeTraining:
    """The native passes of one base and one adapter in training. Called by one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: BaseWeights,
        groups: Mapping[GroupKey, NativeGroup],
        *,
        max_positions: int,
        num_threads: int,
    ) -> None:
        """Reads weights and groups where they lie. Raises NativeUnavailable for a base that it does not cover, and
        MemoryError, as all methods do.
        """
        check_base(config, weights)
        self._library = library
        self._vocab_size = config.vocab_size
        self._hidden_size = config.hidden_size
        self._weights = weights
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta)
        self._groups = groups
        self._tables = [_modules(group) for group in groups.values()]  # held, since C++ reads them
        self._lora = (_Lora * (config.num_layers * len(GROUPS)))()
        for (key, group), table in zip(groups.items(), self._tables, strict=True):
            self._lora[_place(key)] = _describe(group, table)
        self._batch = _Batch()
        self._inputs: tuple[object, ...] = ()
        arguments = BaseArguments(config, weights, self._rotary, num_threads)
        self._training = library.smolora_training_create(*arguments.addresses)
        if not self._training:
            raise MemoryError("no memory for the native passes")
        weakref.finalize(self, library.smolora_training_destroy, self._training).atexit = False

    def forward(
        self,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        kept: Mapping[GroupKey, torch.Tensor] | None = None,
        factor: float = 1.0,
    ) -> torch.Tensor:
        """Final hidden states (tokens, hidden), bf16, of texts of `lengths` tokens, one after the other.

        `kept` are masks (tokens, in) of each group: what dropout keeps of what A meets, which is multiplied by
        `factor`.
        """
        token_ids = token_ids.contiguous()
        if sum(lengths) != len(token_ids) or not 0 < min(lengths) <= max(lengths) <= self._rotary.shape[1]:
            raise ValueError(f"texts of {list(lengths)} tokens: {len(token_ids)} were given")
        self._check_ids(token_ids)
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        hidden = torch.empty(len(token_ids), self._hidden_size, dtype=torch.bfloat16)
        self._inputs = (token_ids, starts, kept)  # held until the backward pass
        for key in self._groups:
            self._lora[_place(key)].kept = None if kept is None else kept[key].data_ptr()
        self._batch = _Batch(
            len(token_ids),
            len(lengths),
            token_ids.data_ptr(),
            starts.ctypes.data,
            ctypes.addressof(self._lora),
            factor,
        )
        self._call(self._library.smolora_training_forward, ctypes.addressof(self._batch), hidden.data_ptr())
        return hidden

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, factor: float) -> tuple[float, torch.Tensor]:
        """The summed cross-entropy (nats) of targets (rows,) under softmax(hidden · headᵀ), and `factor` times its
        gradient in hidden (rows, hidden size), bf16.
        """
        hidden, targets = hidden.contiguous(), targets.contiguous()
        self._check_hidden(hidden, len(targets))
        self._check_ids(targets)
        d_hidden, loss = torch.empty_like(hidden), ctypes.c_double()
        self._call(
            self._library.smolora_training_loss,
            hidden.data_ptr(),
            targets.data_ptr(),
            len(targets),
            factor,
            d_hidden.data_ptr(),
            ctypes.addressof(loss),
        )
        return loss.value, d_hidden

    def backward(self, d_hidden: torch.Tensor) -> None:
        """The gradients of all groups, from the one of the last `forward`'s answer, like it; once."""
        d_hidden = d_hidden.contiguous()
        self._check_hidden(d_hidden, self._batch.num_tokens)
        self._call(self._library.smolora_training_backward, ctypes.addressof(self._batch), d_hidden.data_ptr())
        self._batch, self._inputs = _Batch(), ()

    def _call(self, function: Callable[..., int], *arguments: object) -> None:
        if not function(self._training, *arguments):
            raise MemoryError("no memory for a batch in native code")

    def _check_ids(self, ids: torch.Tensor) -> None:
        """C++ would read anywhere."""
        is_known = not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size
        if ids.dtype is not torch.int64 or not is_known:
            raise ValueError("token ids must be int64, and of the vocabulary")

    def _check_hidden(self, hidden: torch.Tensor, rows: int) -> None:
        if hidden.dtype is not torch.bfloat16 or hidden.shape != (rows, self._hidden_size):
            raise ValueError(f"hidden states must be bf16, of shape ({rows}, {self._hidden_size})")


def _place(key: GroupKey) -> int:
    layer, group = key
    return layer * len(GROUPS) + tuple(GROUPS).index(group)


def _modules(group: NativeGroup) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    for module in group.modules:
        if module.row % ROW_UNIT or module.num_rows % ROW_UNIT:
            raise ValueError(f"rows of a module must come in units of {ROW_UNIT}")
    rows = [(m.row, m.num_rows, m.out_start, m.out_features) for m in group.modules]
    return np.array(rows, np.int64).reshape(-1, 4)


def _describe(group: NativeGroup, table: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> _Lora:
    return _Lora(
        group.a.data_ptr(),
        group.b.data_ptr(),
        group.d_a.data_ptr(),
        group.d_b.data_ptr(),
        group.a.shape[0],
        table.ctypes.data,
        len(table),
        None,
    )
