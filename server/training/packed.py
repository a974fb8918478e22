"""Attention of packed texts in torch, on any device: each text attends causally to itself alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from server.model.device import to_device
from server.model.ops.gradients import apply

TILE, GPU_TILE = 128, 1024
"""The number of queries in a tile of attention. A batch of up to twice as many queries is one tile. A GPU has
larger tiles, since it computes masked scores in less time than it takes to start another tile."""


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some queries, and all keys that any of these queries attends to."""

    queries: slice
    keys: slice
    bias: torch.Tensor  # (queries, keys): -inf if the key belongs to another text or comes later, else 0


class PackedAttention:
    """An implementation of `smollm.Attention` for a flat batch of texts with `lengths` tokens (1 or more each).

    The batch is cut into tiles of queries. A tile's queries are multiplied by the keys from the start of the
    tile's first text to the tile's end. So there are few, large products, and the mask discards few
    scores. The backward pass recomputes a tile's attention weights, so that only q, k and v are kept.

    The result is differentiable once. `positions` (tokens,) are each token's position in its text.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        assert all(length > 0 for length in lengths)
        sizes = torch.tensor(lengths)
        first_of_text = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # for each token
        starts = to_device(first_of_text, device)
        place = torch.arange(len(starts), device=device)
        self.positions = place - starts
        size = TILE if device.type == "cpu" else GPU_TILE
        size = size if len(place) > 2 * size else len(place)  # one tile is fastest for so few
        self._tiles = [
            self._tile(slice(first, min(first + size, len(place))), int(first_of_text[first]), place, starts)
            for first in range(0, len(place), size)
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the output, shaped like q (tokens, heads, head_dim). k and v are (tokens, kv_heads, head_dim)."""
        return apply(_Attend, q, k, v, self._tiles)

    @staticmethod
    def _tile(queries: slice, first_key: int, place: torch.Tensor, starts: torch.Tensor) -> _Tile:
        keys = slice(first_key, queries.stop)
        unseen = (place[keys] < starts[queries, None]) | (place[keys] > place[queries, None])
        bias = torch.zeros(unseen.shape, device=place.device).masked_fill_(unseen, float("-inf"))
        return _Tile(queries, keys, bias)


class _Attend(torch.autograd.Function):
    """Computes softmax(q kᵀ / √head_dim) v, tile by tile. The query heads that share a kv head are treated as
    additional queries of that kv head.

    The division by √head_dim is applied to k.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tiles: Sequence[_Tile],
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles = tiles
        k, v = _by_head(k) * q.shape[-1] ** -0.5, _by_head(v)
        out = q.new_empty(q.shape)
        for tile in tiles:
            weights = _weights(_grouped(q[tile.queries], k.shape[0]), k, tile)
            _ungroup(torch.bmm(weights, v[:, tile.keys]), out[tile.queries])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # noqa: ANN401
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        k, v = _by_head(k) * scale, _by_head(v)
        dq = q.new_empty(q.shape)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for tile in ctx.tiles:
            q_tile, d_tile = _grouped(q[tile.queries], k.shape[0]), _grouped(d_out[tile.queries], k.shape[0])
            weights = _weights(q_tile, k, tile)
            d_weights = torch.bmm(d_tile, v[:, tile.keys].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv[:, tile.keys] += torch.bmm(weights.transpose(1, 2), d_tile)
            dk[:, tile.keys] += torch.bmm(d_scores.transpose(1, 2), q_tile)
            _ungroup(torch.bmm(d_scores, k[:, tile.keys]), dq[tile.queries])
        return dq, (dk * scale).transpose(0, 1).to(q.dtype), dv.transpose(0, 1).to(q.dtype), None


def _weights(q: torch.Tensor, k: torch.Tensor, tile: _Tile) -> torch.Tensor:
    """Return a tile's masked softmax(q kᵀ), shaped (kv_heads, rows of q, keys). q is from `_grouped`."""
    scores = torch.bmm(q, k[:, tile.keys].transpose(1, 2))
    scores.view(-1, *tile.bias.shape).add_(tile.bias.to(scores.dtype))
    return scores.softmax(-1)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """Copy (tokens, kv_heads, head_dim) to a contiguous (kv_heads, tokens, head_dim)."""
    return x.transpose(0, 1).contiguous()


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Reshape x (queries, heads, head_dim) to (kv_heads, heads / kv_heads * queries, head_dim)."""
    queries, heads, dim = x.shape
    return x.view(queries, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def _ungroup(x: torch.Tensor, out: torch.Tensor) -> None:
    """Undo `_grouped`: write x to `out` (queries, heads, head_dim)."""
    queries, heads, dim = out.shape
    out.copy_(x.view(heads, queries, dim).transpose(0, 1))
