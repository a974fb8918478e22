"""A base as native code is given it."""

import ctypes

import torch

from server.model.config import ModelConfig
from server.model.native.library import NativeUnavailable
from server.model.rank_rows import NATIVE_TILE
from server.model.weights import BaseWeights

_MAX_GROUP = 8  # query heads of a kv head


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "max_positions", "threads")),
        ("eps", ctypes.c_double),
    )


class BaseArguments:
    """The arguments of `smolora_create` and `smolora_training_create`. They are read during that call alone, but
    the tensors that they lead to, and the rotary table, are read for as long as what was created lives.
    """

    def __init__(self, config: ModelConfig, weights: BaseWeights, rotary: torch.Tensor, num_threads: int) -> None:
        """`rotary` is a whole `rotary_table`."""
        tensors = [weights.embed]
        for layer in weights.layers:
            tensors += [layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.gate_up, layer.down]
        tensors += [weights.final_norm, weights.lm_head]
        self._sizes = _Sizes(
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
        self._tensors = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        flags = [layer not in config.nope_layers for layer in range(config.num_layers)]
        self._uses_rotary = (ctypes.c_uint8 * config.num_layers)(*flags)
        self._rotary = rotary.data_ptr()

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Sizes, tensors, rotary table, and whether each layer uses it. This object must outlive the call."""
        return (
            ctypes.addressof(self._sizes),
            ctypes.addressof(self._tensors),
            self._rotary,
            ctypes.addressof(self._uses_rotary),
        )


def check_base(config: ModelConfig, weights: BaseWeights) -> None:
    """Raises NativeUnavailable where the native code doesn't cover a base."""
    if any(tensor.dtype is not torch.bfloat16 or tensor.device.type != "cpu" for _, tensor in weights.tensors()):
        raise NativeUnavailable("it computes in bf16 on a CPU alone")
    if any(not tensor.is_contiguous() for _, tensor in weights.tensors()):
        raise NativeUnavailable("it needs contiguous weights")
    for name, size in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
    ):
        if size % NATIVE_TILE:
            raise NativeUnavailable(f"{name} is no multiple of {NATIVE_TILE}")
    if config.num_heads // config.num_kv_heads > _MAX_GROUP:
        raise NativeUnavailable(f"more than {_MAX_GROUP} query heads share a kv head")
