"""The forward and backward passes of training in native code. This module passes tensors to `train.cpp`.

These passes compute what `SmolLM.forward` computes with `PackedAttention` and `TrainedRows`, and its gradients.
Operands of products are bf16; sums, the residual stream and its gradient are fp32, so results are closer to fp32
results than torch's bf16 results are. Results are deterministic and don't depend on the number of threads.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights
from server.model.native.abi import TRAIN_PHASES, TrainBatch, TrainGroup, TrainModule, call, take_phases
from server.model.native.model import check_base, create, tensor_names
from server.model.ops.norms import rotary_table
from server.model.rank_rows import GROUPS, GroupKey, GroupLayout


@dataclass(frozen=True)
class NativeRows:
    """Where the rows of one module's A and B are in its NativeGroup's tensors, and where their gradients go."""

    row: int
    num_rows: int  # a multiple of ROW_UNIT
    out_start: int  # the module's first feature in the group's fused output
    out_features: int
    trained: int  # the first `trained` rows are trained
    a_start: int  # the start of A's gradient (trained, in) in the flat gradients
    b_start: int  # the start of B's gradient (out_features, trained)
    scaling: float  # A includes it
    repeats: int = 1  # 2 if these rows of A are followed by the same rows minus a constant


@dataclass(frozen=True, eq=False)
class NativeGroup:
    """LoRA weights, in bf16, of one layer's modules that read the same input.

    `a` (rows, in features) includes the scalings. In `b` (rows, out features of all modules), a
    row is zero except in the features of its own module.
    """

    a: torch.Tensor
    b: torch.Tensor
    modules: Sequence[NativeRows]


@dataclass(frozen=True, eq=False)
class NativeDropout:
    """Dropout of the inputs of LoRA's A.

    `keys` has a number for each token; None means no dropout. On average, `num_dropped` of 65,536 features are
    dropped. Kept features are multiplied by `factor`.
    """

    keys: npt.NDArray[np.uint64] | None = None
    num_dropped: int = 0
    factor: float = 1.0


class NativeTraining:
    """Native passes that train an adapter, or the base itself. Only one thread at a time may call the methods."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: BaseWeights,
        groups: Mapping[GroupKey, NativeGroup],
        *,
        max_positions: int,
        num_threads: int,
        gradients: torch.Tensor | None = None,
        d_weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Keep `weights` and `groups`, which native code reads in place.

        The gradients of A and B are added to `gradients`, fp32 and flat (None if there are no groups). The base
        weights' gradients are added to `d_weights`, fp32 tensors by the names of `weights.tensors()`. If
        `d_weights` is None, the base is frozen. Raise NativeUnavailable if native code doesn't support the base.

        All methods raise MemoryError if memory runs out, and ValueError if an access would be out of bounds. After
        such an error, methods can be called again.
        """
        check_base(config, weights)
        self._library = library
        self._vocab_size = config.vocab_size
        self._hidden_size = config.hidden_size
        self._weights = weights
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta)
        gradients = torch.zeros(0) if gradients is None else gradients
        if gradients.dtype is not torch.float32 or gradients.ndim != 1 or not gradients.is_contiguous():
            raise ValueError("the gradients must be fp32, in one row")
        self._gradients = gradients
        self._groups, self._tables = groups, []  # kept, since native code reads them in place
        self._lora = (TrainGroup * (config.num_layers * len(GROUPS)))()
        for key, group in groups.items():
            _check_group(config, key, group)
            table = _modules(group)
            self._tables.append(table)
            self._lora[place_of(key)] = _describe(group, table)
        self._d_weights = None if d_weights is None else _gradients(weights, d_weights)
        self._num_tokens = 0  # in the last forward pass
        self._inputs: tuple[object, ...] = ()
        self._training = create(library.smolora_training_create, config, weights, self._rotary, num_threads)
        weakref.finalize(self, library.smolora_training_destroy, self._training).atexit = False

    def forward(
        self,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        dropout: NativeDropout | None = None,
        *,
        has_backward: bool = True,
    ) -> torch.Tensor:
        """Return the hidden states (tokens, hidden size) after the last norm, in bf16.

        `token_ids` has the texts one after the other. `lengths` are the texts' numbers of tokens. If
        `has_backward` is false, nothing is saved for the backward pass, and `backward` can't be called.
        """
        self._num_tokens = 0
        token_ids = token_ids.contiguous()
        self._check_ids(token_ids)
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        hidden = torch.empty(len(token_ids), self._hidden_size, dtype=torch.bfloat16)
        dropout = NativeDropout() if dropout is None else dropout
        batch = TrainBatch(
            num_tokens=len(token_ids),
            num_texts=len(lengths),
            token_ids=token_ids.data_ptr(),
            starts=starts.ctypes.data,
            lora=ctypes.addressof(self._lora),
            gradients=self._gradients.data_ptr(),
            num_gradients=len(self._gradients),
            dropout_keys=_keys(dropout.keys, len(token_ids)),
            num_dropped=dropout.num_dropped,
            factor=dropout.factor,
            has_backward=has_backward,
            d_weights=None if self._d_weights is None else ctypes.addressof(self._d_weights),
        )
        call(self._library.smolora_training_forward, self._training, ctypes.addressof(batch), hidden.data_ptr())
        if not has_backward:
            return hidden
        self._num_tokens = len(token_ids)
        self._inputs = (token_ids, starts, dropout)  # kept until the backward pass
        return hidden

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, factor: float) -> tuple[float, torch.Tensor]:
        """Return the summed cross-entropy of `targets` in nats, and `factor` times its gradient.

        The prediction for targets (rows,) is softmax(hidden · headᵀ). The gradient is with respect to `hidden`.
        Both are bf16 of shape (rows, hidden size). The output head's gradient is added to `d_weights`.
        """
        hidden, targets = hidden.contiguous(), targets.contiguous()
        self._check_hidden(hidden, len(targets))
        self._check_ids(targets)
        d_hidden, loss = torch.empty_like(hidden), ctypes.c_double()
        call(
            self._library.smolora_training_loss,
            self._training,
            hidden.data_ptr(),
            targets.data_ptr(),
            len(targets),
            factor,
            d_hidden.data_ptr(),
            None if self._d_weights is None else self._d_weights[-1],
            ctypes.addressof(loss),
        )
        return loss.value, d_hidden

    def measure(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's cross-entropy in fp64 (`loss` returns the sum) and its likeliest token (int64)."""
        hidden, targets = hidden.contiguous(), targets.contiguous()
        self._check_hidden(hidden, len(targets))
        self._check_ids(targets)
        losses, likeliest = torch.empty(len(targets), dtype=torch.float64), torch.empty_like(targets)
        call(
            self._library.smolora_training_measure,
            self._training,
            hidden.data_ptr(),
            targets.data_ptr(),
            len(targets),
            losses.data_ptr(),
            likeliest.data_ptr(),
        )
        return losses, likeliest

    def backward(self, d_hidden: torch.Tensor) -> None:
        """Add all gradients except the output head's to `gradients` and `d_weights`. Call this once after a
        `forward`.

        `d_hidden` is the gradient of the loss with respect to the result of `forward`.
        """
        d_hidden = d_hidden.contiguous()
        self._check_hidden(d_hidden, self._num_tokens)
        call(self._library.smolora_training_backward, self._training, d_hidden.data_ptr())
        self._num_tokens, self._inputs = 0, ()

    def take_phases(self, *, count: bool = True) -> dict[str, float]:
        """Return the seconds spent in each of TRAIN_PHASES since the last call of this method."""
        return take_phases(self._library.smolora_training_phases, self._training, TRAIN_PHASES, count)

    def _check_ids(self, ids: torch.Tensor) -> None:
        if ids.dtype is not torch.int64 or ids.ndim != 1:
            raise ValueError("token ids must be int64, in one row")

    def _check_hidden(self, hidden: torch.Tensor, rows: int) -> None:
        if hidden.dtype is not torch.bfloat16 or hidden.shape != (rows, self._hidden_size):
            raise ValueError(f"hidden states must be bf16, of shape ({rows}, {self._hidden_size})")


def _gradients(weights: BaseWeights, d_weights: Mapping[str, torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the gradients' addresses in the order of `tensor_names`.

    Raise ValueError if a gradient has a wrong dtype or shape.
    """
    for name, tensor in weights.tensors():
        d = d_weights[name]
        if d.shape != tensor.shape or d.dtype is not torch.float32 or not d.is_contiguous():
            raise ValueError(f"the gradient of {name} must be fp32, contiguous, and of its shape")
    pointers = [d_weights[name].data_ptr() for name in tensor_names(weights)]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def place_of(key: GroupKey) -> int:
    """Return the index of one layer's group of modules (a key of `GROUPS`) among the groups of all layers."""
    layer, group = key
    return layer * len(GROUPS) + tuple(GROUPS).index(group)


def _modules(group: NativeGroup) -> ctypes.Array[TrainModule]:
    return (TrainModule * len(group.modules))(
        *(
            TrainModule(
                *(m.row, m.num_rows, m.out_start, m.out_features),
                *(m.trained, m.repeats, m.a_start, m.b_start, m.scaling),
            )
            for m in group.modules
        )
    )


def _check_group(config: ModelConfig, key: GroupKey, group: NativeGroup) -> None:
    """Raise ValueError if `a` or `b` has a wrong dtype or shape. Native code checks `modules` with each batch."""
    layout = GroupLayout.of(key[1], config.shape)
    a_shape = (len(group.a), layout.in_features)
    b_shape = (len(group.a), sum(layout.out_features.values()))
    for name, tensor, shape in (("a", group.a, a_shape), ("b", group.b, b_shape)):
        if tensor.shape != shape or tensor.dtype is not torch.bfloat16 or not tensor.is_contiguous():
            raise ValueError(f"{name} of {key} must be bf16, contiguous, and of shape {shape}")


def _keys(keys: npt.NDArray[np.uint64] | None, num_tokens: int) -> int | None:
    """Return the address of the dropout keys, or None without dropout.

    Raise ValueError if they aren't uint64, one for each token.
    """
    if keys is None:
        return None
    if keys.shape != (num_tokens,) or keys.dtype != np.uint64 or not keys.flags.c_contiguous:
        raise ValueError(f"the keys of dropout must be uint64, contiguous, and of shape ({num_tokens},)")
    return keys.ctypes.data


def _describe(group: NativeGroup, table: ctypes.Array[TrainModule]) -> TrainGroup:
    return TrainGroup(
        group.a.data_ptr(),
        group.b.data_ptr(),
        group.a.shape[0],
        ctypes.addressof(table),
        len(table),
    )
