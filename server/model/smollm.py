"""The SmolLM forward pass in torch, for prefill, decode and training.

A flat batch has tokens of any number of sequences. Serving and training pass in what differs between them:
`Attention` selects the keys that each token sees (a paged cache, or packed rows), and `Adapters` adds the low-rank
products of each token's adapters. The base's weights are never written.

This module covers Llama as SmolLM and SmolLM2 use it (grouped queries, tied or untied embeddings), and SmolLM3
(some layers without rotary embedding). Callers do dropout, sampling and losses.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights, LayerWeights
from server.model.ops.linear import Linear
from server.model.ops.norms import rms_norm, rotary, rotary_table, swiglu


class Attention(Protocol):
    """Selects the keys and values that each token of the flat batch attends to."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the attention of q (tokens, heads, head_dim), in q's shape, over the new keys and values k and v
        (tokens, kv_heads, head_dim) and over earlier ones."""
        ...


class Adapters(Protocol):
    """The low-rank products of each token's adapters."""

    def add(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return y (tokens, the group's out) plus the adapters' products for the inputs x (tokens, in).

        `group` is a key of `server.model.rank_rows.GROUPS`. y may be written in place if no gradient flows.
        """
        ...


class NoAdapters:
    """`Adapters` that add nothing: the frozen base alone."""

    def add(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


class Layer:
    """One decoder layer: attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, index: int, config: ModelConfig, weights: LayerWeights, *, pack: bool) -> None:
        self.index = index
        self.config = config
        self.uses_rotary = index not in config.nope_layers
        self.input_norm = weights.input_norm
        self.post_norm = weights.post_norm
        self.qkv = Linear(weights.qkv, pack=pack)
        self.o = Linear(weights.o, pack=pack)
        self.gate_up = Linear(weights.gate_up, pack=pack)
        self.down = Linear(weights.down, pack=pack)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention, adapters: Adapters
    ) -> torch.Tensor:
        config, index = self.config, self.index
        tokens, heads, kv_heads, dim = hidden.shape[0], config.num_heads, config.num_kv_heads, config.head_dim

        x = rms_norm(hidden, self.input_norm, config.rms_norm_eps)
        qkv = adapters.add(index, "qkv", x, self.qkv(x)).view(tokens, heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.uses_rotary:
            qk = rotary(qk, cos, sin)
        x = attention.attend(index, qk[:, :heads], qk[:, heads:], v).reshape(tokens, heads * dim)
        hidden = hidden + adapters.add(index, "o", x, self.o(x))

        x = rms_norm(hidden, self.post_norm, config.rms_norm_eps)
        x = swiglu(adapters.add(index, "gate_up", x, self.gate_up(x)))
        return hidden + adapters.add(index, "down", x, self.down(x))


class SmolLM:
    """The frozen base. `pack` rearranges the weights for faster inference; training needs `pack=False`."""

    def __init__(
        self, config: ModelConfig, weights: BaseWeights, *, max_positions: int, pack: bool = False
    ) -> None:
        self.config = config
        self.embed = weights.embed  # (vocab, hidden)
        self.final_norm = weights.final_norm
        self.lm_head = Linear(weights.lm_head, pack=pack)
        self.layers = [Layer(i, config, layer, pack=pack) for i, layer in enumerate(weights.layers)]
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta).to(self.embed)

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention, adapters: Adapters
    ) -> torch.Tensor:
        """Return the final hidden states (tokens, hidden) of the flat batch token_ids (tokens,) at positions
        (tokens,)."""
        cos, sin = self._rotary[:, positions].unsqueeze(2)  # each (tokens, 1, head_dim)
        hidden = F.embedding(token_ids, self.embed)
        for layer in self.layers:
            hidden = layer.forward(hidden, cos, sin, attention, adapters)
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (rows, vocab) for rows of `forward`'s result, hidden (rows, hidden)."""
        return self.lm_head(hidden).float()
