"""Attention of a training batch: many short texts in one flat batch, none of which sees another.

Texts lie one after the other; each attends causally to itself alone (a block-diagonal mask) and counts its
positions from 0, so that a text's loss is the same whatever it is packed with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class PackedAttention:
    """`smollm.Attention` for texts of `lengths` tokens (1 or more), in order, in one flat batch. Differentiable.

    `positions` (tokens,) are what the forward pass takes beside it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        assert all(length > 0 for length in lengths)
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self._groups = [_Group(members, device) for members in _similar(lengths)]
        order = torch.cat([group.tokens for group in self._groups])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        in_order = bool((order.diff() == 1).all())
        self._place = None if in_order else place

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (tokens, heads, head_dim), k, v (tokens, kv_heads, head_dim); like q."""
        parts = [group.attend(q, k, v) for group in self._groups]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self._place is None else out.index_select(0, self._place)


class _Group:
    """Texts of similar lengths, attended to in one call, padded at their ends to the longest."""

    def __init__(self, members: Sequence[tuple[int, int]], device: torch.device) -> None:
        """`members`: (first token, length) of each text."""
        self.num_texts = len(members)
        self.longest = max(length for _, length in members)
        # Padding repeats the text's last token: a causal mask keeps it from all that counts.
        place = torch.arange(self.longest)
        starts = torch.tensor([start for start, _ in members])[:, None]
        lengths = torch.tensor([length for _, length in members])[:, None]
        padded = (starts + torch.minimum(place, lengths - 1)).flatten()
        is_kept = (place < lengths).flatten()
        self.tokens = padded[is_kept].to(device)
        first, end = members[0][0], members[0][0] + len(padded)
        is_plain = torch.equal(padded, torch.arange(first, end))
        self.span = slice(first, end) if is_plain else None  # neighbours of one length: nothing is to be moved
        self.padded = padded.to(device)
        self.kept = is_kept.nonzero()[:, 0].to(device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The texts' own rows of the answer, text by text: (their tokens, heads, head_dim)."""
        q, k, v = self._spread(q), self._spread(k), self._spread(v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).flatten(0, 1)  # (texts * longest, heads, head_dim)
        return out if self.span is not None else out.index_select(0, self.kept)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, heads, head_dim) text by text: (texts, heads, longest, head_dim)."""
        x = x.index_select(0, self.padded) if self.span is None else x[self.span]
        return x.view(self.num_texts, self.longest, *x.shape[1:]).transpose(1, 2)


def _similar(lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The texts as (first token, length), grouped so that padding at most doubles one: by power of two."""
    groups: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        groups.setdefault((length - 1).bit_length(), []).append((start, length))
        start += length
    return list(groups.values())
