"""Attention over a paged cache of keys and values.

A layer's cache is a pair of tensors (num_blocks, block_size, kv_heads, head_dim). A sequence's block table lists
the blocks of its positions, in order. Queries are grouped (Ainslie et al. 2023, arXiv:2305.13245). There are two
cases:

- `attend_sequence`: any number of new tokens of one sequence over that sequence's keys.
- `attend_decode`: one new token for each of many sequences, with block tables of different lengths.

`plan_decode` builds the indices for `attend_decode` once per step, for all layers. On a CPU, `embedding_bag` reads
the values from the cache and sums them. On a GPU, values are gathered into one tensor first, as keys are, and then
multiplied: `embedding_bag` would process all positions of a head in one thread there.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class ValueRows:
    """The indices of every head's values in a layer's cache, for `embedding_bag`.

    The cache is viewed as a tensor (positions of all blocks * kv_heads, head_dim).
    """

    rows: torch.Tensor  # (sequences * heads * max_positions,)
    bags: torch.Tensor  # (sequences * heads + 1,): each head's first index in `rows`


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The indices for one step's `attend_decode`, the same for all layers."""

    block_table: torch.Tensor  # (sequences * max_blocks,): padded with block 0
    beyond: torch.Tensor  # (sequences, 1, max_positions): whether a position is past its sequence's end
    kv_of_head: torch.Tensor  # (heads,)
    head_of: torch.Tensor  # (heads, kv_heads, 1): the softmax scale at the head's kv head, else 0
    value_rows: ValueRows | None  # None: values are gathered instead


def plan_decode(
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    gather_values: bool,
) -> DecodePlan:
    """Return the plan for sequences with `lengths` (sequences,) and a block_table (sequences, max_blocks)."""
    device = block_table.device
    num_sequences, max_blocks = block_table.shape
    positions = torch.arange(max_blocks * block_size, device=device)
    beyond = positions >= lengths[:, None]  # (sequences, positions)

    kv_of_head = torch.arange(num_heads, device=device) // (num_heads // num_kv_heads)
    is_own = kv_of_head[:, None] == torch.arange(num_kv_heads, device=device)  # (heads, kv_heads)
    head_of = is_own.to(dtype)[..., None] * head_dim**-0.5
    value_rows = None
    if not gather_values:
        slots = block_table.repeat_interleave(block_size, dim=1) * block_size + positions % block_size
        slots.masked_fill_(beyond, 0)  # these weights are 0, but a block may still have another sequence's NaN
        rows = slots[:, None] * num_kv_heads + kv_of_head[:, None]  # (sequences, heads, positions)
        bags = torch.arange(num_sequences * num_heads + 1, device=device) * positions.shape[0]
        value_rows = ValueRows(rows.flatten(), bags)
    return DecodePlan(block_table.flatten(), beyond[:, None], kv_of_head, head_of, value_rows)


def attend_decode(plan: DecodePlan, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    """Return the attention of q (sequences, heads, head_dim), one token each, over a layer's caches, in q's shape.

    Each query is expanded to all kv heads, with zeros for all except its own kv head. So one batched product with
    the gathered keys, which keep the cache's order, gives the scores of all heads.
    """
    num_sequences, heads, dim = q.shape
    keys = _gather(plan, k_cache)
    spread = (q[:, :, None] * plan.head_of).view(num_sequences, heads, -1)  # (sequences, heads, kv_heads * dim)
    scores = torch.bmm(spread, keys.transpose(1, 2)).masked_fill_(plan.beyond, float("-inf"))
    weights = scores.softmax(-1)  # (sequences, heads, positions)
    if plan.value_rows is None:
        return _sum_gathered(plan, weights, v_cache)
    values = F.embedding_bag(
        plan.value_rows.rows,
        v_cache.view(-1, dim),
        plan.value_rows.bags,
        mode="sum",
        per_sample_weights=weights.view(-1),
        include_last_offset=True,
    )
    return values.view(num_sequences, heads, dim)


def _sum_gathered(plan: DecodePlan, weights: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    """Gather the values, and return their weighted sums (sequences, heads, head_dim)."""
    num_sequences, heads, _ = weights.shape
    values = _gather(plan, v_cache)
    values.masked_fill_(plan.beyond.transpose(1, 2), 0)  # 0 times NaN is NaN
    sums = torch.bmm(weights, values).view(num_sequences, heads, *v_cache.shape[2:])
    own = plan.kv_of_head[None, :, None, None].expand(num_sequences, heads, 1, v_cache.shape[3])
    return sums.gather(2, own).squeeze(2)


def _gather(plan: DecodePlan, cache: torch.Tensor) -> torch.Tensor:
    """Copy the sequences' blocks of a layer's keys or values: (sequences, positions, kv_heads * head_dim)."""
    blocks = cache.flatten(1).index_select(0, plan.block_table)  # (sequences * max_blocks, block * kv_heads * dim)
    return blocks.view(plan.beyond.shape[0], plan.beyond.shape[-1], -1)


def attend_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the attention of q (new, heads, head_dim), of q's shape, over one sequence's k and v (positions,
    kv_heads, head_dim).

    `bias` (new, positions) is added to the scores; None lets every token see every position. With a bias,
    numbers in the new tokens' k and v that aren't finite are overwritten in place. The result of every token that
    sees such a position is NaN.
    """
    new, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    sees_overflow = None if bias is None else _replace_overflows(k[-new:], v[-new:])
    # The heads of a group become further queries of its kv head, so that no key is repeated.
    q = q.view(new, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * new, dim)
    if bias is not None:
        bias = bias.repeat(group, 1)  # (group * new, positions)
    out = F.scaled_dot_product_attention(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=bias)
    out = out.view(kv_heads, group, new, dim).permute(2, 0, 1, 3).reshape(new, heads, dim)
    return out if sees_overflow is None else out.masked_fill_(sees_overflow[:, None, None], float("nan"))


def _replace_overflows(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Overwrite numbers in the new tokens' k and v (new, kv_heads, head_dim) that aren't finite. Return a mask
    (new,) of the tokens at or after the first position with such a number.

    If such numbers were kept, the results of tokens before that position would be NaN, too: a weight of 0 times
    infinity is NaN, and so is a bias of -inf added to NaN.
    """
    overflows = ~(k.isfinite() & v.isfinite()).flatten(1).all(1)
    for tensor in (k, v):
        tensor.nan_to_num_(0.0, 0.0, 0.0)
    return overflows.cumsum(0) > 0


def causal_bias(start: int, new: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Return the bias (new, start + new) that lets the token at position start + i see positions 0 to start + i.

    Return None if `new` is 1: a single token sees every position.
    """
    if new == 1:
        return None
    bias = torch.full((new, start + new), float("-inf"), dtype=dtype, device=device)
    return bias.triu_(start + 1)
