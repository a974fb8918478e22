"""Both samplers with one signature: torch's, and the native one over logits of any width."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.nn import functional as F

from server.engine.native_backend import sample_natively
from server.engine.sampling import LogitsRow, Sampled
from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights, LayerWeights
from server.model.native.abi import TILE
from server.model.native.model import NativeModel
from tests.kits.native import native_library

Sample = Callable[[torch.Tensor, Sequence[LogitsRow]], list[Sampled]]


def native_sample(num_threads: int) -> Sample:
    """Return a sampler in native code, which `native_library` may find missing.

    Logits are padded to whole tiles with minus infinity.
    """
    native_library()

    def sample(logits: torch.Tensor, rows: Sequence[LogitsRow]) -> list[Sampled]:
        width = logits.shape[1]
        wide = F.pad(logits, (0, -width % TILE), value=float("-inf"))
        found = sample_natively(any_model(wide.shape[1], num_threads), rows, wide)
        logits.copy_(wide[:, :width])
        return found

    return sample


@cache
def any_model(vocab_size: int, num_threads: int) -> NativeModel:
    """Return a model of this vocabulary; its other properties don't matter."""
    size, generator = 32, torch.Generator().manual_seed(0)
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=size,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        nope_layers=frozenset(),
        eos_token_ids=(0,),
    )

    def matrix(out: int) -> torch.Tensor:
        return torch.randn(out, size, generator=generator).bfloat16()

    ones = torch.ones(size, dtype=torch.bfloat16)
    layer = LayerWeights(ones, matrix(3 * size), matrix(size), ones, matrix(2 * size), matrix(size))
    embed = matrix(vocab_size)
    weights = BaseWeights(embed, (layer,), ones, embed)
    return NativeModel(native_library(), config, weights, max_positions=64, num_threads=num_threads)
