"""Hands a base to native code."""

import ctypes
from collections.abc import Callable

import torch

from server.model.base.config import ModelConfig
from server.model.base.quantized import BLOCK, BLOCK_BYTES, Quantized
from server.model.base.weights import BaseWeights
from server.model.native.abi import MAX_GROUP, TILE, WEIGHT_TYPES, BaseSizes, BaseTensor, call
from server.model.native.library import NativeUnavailable


def create(
    entry: Callable[..., int], config: ModelConfig, weights: BaseWeights, rotary: torch.Tensor, num_threads: int
) -> int:
    """Call `smolora_create` or `smolora_training_create` for a base, and return the new object. Raise MemoryError.

    `rotary` is a whole `rotary_table`. The caller keeps it and the weights for as long as the object exists.
    """
    tensors = dict(weights.tensors())
    names = tensor_names(weights)
    sizes = BaseSizes(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        rotary.shape[1],
        num_threads,
        config.rms_norm_eps,
    )
    table = (BaseTensor * len(names))(*(_tensor(tensors[name], weights.quantized.get(name)) for name in names))
    uses_rotary = (ctypes.c_uint8 * config.num_layers)(
        *(layer not in config.nope_layers for layer in range(config.num_layers))
    )
    created = ctypes.c_void_p()
    call(entry, ctypes.byref(sizes), table, rotary.data_ptr(), uses_rotary, ctypes.byref(created))
    assert created.value is not None
    return created.value


def tensor_names(weights: BaseWeights) -> list[str]:
    """Return all tensors' names in the order of `smolora_create`, a tied head's included."""
    names = [name for name, _ in weights.tensors()]
    return names if weights.lm_head is not weights.embed else [*names, "embed"]


def _tensor(values: torch.Tensor, stored: Quantized | None) -> BaseTensor:
    if stored is None:
        return BaseTensor(values.data_ptr(), WEIGHT_TYPES.index("BF16"), None)
    return BaseTensor(values.data_ptr(), WEIGHT_TYPES.index(stored.type), stored.blocks.data_ptr())


def check_base(config: ModelConfig, weights: BaseWeights) -> None:
    """Raise NativeUnavailable if the native code doesn't cover a base."""
    if any(tensor.dtype is not torch.bfloat16 or tensor.device.type != "cpu" for _, tensor in weights.tensors()):
        raise NativeUnavailable("it computes in bf16 on a CPU alone")
    if any(not tensor.is_contiguous() for _, tensor in weights.tensors()):
        raise NativeUnavailable("it needs contiguous weights")
    for name, stored in weights.quantized.items():
        rows, columns = dict(weights.tensors())[name].shape
        if stored.blocks.shape != (rows, columns // BLOCK * BLOCK_BYTES[stored.type]) or columns % BLOCK:
            raise NativeUnavailable(f"{name} has blocks of another shape than its weights")
    for name, size in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
    ):
        if size % TILE:
            raise NativeUnavailable(f"{name} is no multiple of {TILE}")
    if config.num_heads // config.num_kv_heads > MAX_GROUP:
        raise NativeUnavailable(f"more than {MAX_GROUP} query heads share a kv head")
