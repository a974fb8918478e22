"""Attention over the paged cache, for any number of new tokens of any sequences, in two kernels.

A sequence's positions are split at multiples of `SPLIT`. `attention_split` attends to one split, and
`attention_combine` joins a token's splits by their log-sum-exps, in order (as in FlashDecoding). Since borders are
absolute, a token's sums have the same order if it is decoded or prefilled, and whatever prefix was cached.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803
import torch
import triton
import triton.language as tl

SPLIT = 256
"""Positions of a split."""
FIELDS = 7
"""A work item's int32: the first token's row, tokens, the first token's position, the start of the sequence's
pages in the tables, the split, the first token's part, and how many parts later the next token's part is."""


@triton.jit
def attention_split(
    q,
    k_cache,
    v_cache,
    tables,
    works,
    num_works,
    part_out,
    part_lse,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from up to 16 / group tokens of one sequence to one split. Grid: (any number, KV_HEADS).

    q (tokens, HEADS, DIM); k_cache and v_cache (pages, PAGE, KV_HEADS, DIM); tables (pages of all
    sequences) int32; part_out (parts, HEADS, DIM) and part_lse (parts, HEADS) fp32. SCALE includes log2(e).
    """
    kv_head = tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    m = tl.arange(0, 16)
    d = tl.arange(0, DIM)
    token = m // group
    head = kv_head * group + m % group
    for work in range(tl.program_id(0), tl.load(num_works), tl.num_programs(0)):
        row = tl.load(works + work * 7)
        tokens = tl.load(works + work * 7 + 1)
        position = tl.load(works + work * 7 + 2)
        table = tl.load(works + work * 7 + 3)
        split = tl.load(works + work * 7 + 4)
        part = tl.load(works + work * 7 + 5)
        stride = tl.load(works + work * 7 + 6)
        live = token < tokens
        queries = tl.load(
            q + ((row + token) * HEADS + head)[:, None] * DIM + d[None, :], mask=live[:, None], other=0.0
        )
        top = tl.full((16,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((16,), dtype=tl.float32)
        acc = tl.zeros((16, DIM), dtype=tl.float32)
        end = position + tokens
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_N):
            p = start + tl.arange(0, BLOCK_N)
            exists = p < end
            page = tl.load(tables + table + p // PAGE, mask=exists, other=0).to(tl.int64)
            place = ((page * PAGE + p % PAGE) * KV_HEADS + kv_head) * DIM
            keys = tl.load(k_cache + place[None, :] + d[:, None], mask=exists[None, :], other=0.0)
            scores = tl.dot(queries, keys, input_precision="ieee") * SCALE
            is_seen = live[:, None] & (p[None, :] <= (position + token)[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            e = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(e, 1)
            values = tl.load(v_cache + place[:, None] + d[None, :], mask=exists[:, None], other=0.0)
            acc = tl.dot(e.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
            top = new_top
        own = (part + token * stride) * HEADS + head
        inverse = tl.where(total > 0, 1.0 / total, 0.0)
        tl.store(part_out + own[:, None] * DIM + d[None, :], acc * inverse[:, None], mask=live[:, None])
        tl.store(part_lse + own, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=live)


@triton.jit
def attention_combine(part_out, part_lse, parts, out, HEADS: tl.constexpr, DIM: tl.constexpr):
    """out (tokens, HEADS, DIM) from each token's parts; parts (tokens, 2) has the first and how many.

    A token without parts (padding) is left as it is. Grid: (tokens, HEADS).
    """
    token, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(parts + token * 2)
    num = tl.load(parts + token * 2 + 1)
    d = tl.arange(0, DIM)
    top = float("-inf")
    for i in range(num):
        top = tl.maximum(top, tl.load(part_lse + (first + i) * HEADS + head))
    acc = tl.zeros((DIM,), dtype=tl.float32)
    total = 0.0
    for i in range(num):
        weight = tl.exp2(tl.load(part_lse + (first + i) * HEADS + head) - top)
        acc += weight * tl.load(part_out + ((first + i) * HEADS + head) * DIM + d)
        total += weight
    if num > 0:
        tl.store(out + (token * HEADS + head) * DIM + d, (acc / total).to(out.dtype.element_ty))


def attention_in_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    works: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Compute both kernels' result for the tokens of `works`. `scale` doesn't include log2(e)."""
    group = q.shape[1] // k_cache.shape[2]
    for row, tokens, position, table in works[works[:, 4] == 0, :4].tolist():
        pages = tables[table : table - (-(position + tokens) // k_cache.shape[1])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[: position + tokens].float().repeat_interleave(group, 1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("thd,phd->htp", q[row : row + tokens].float(), keys) * scale
        later = torch.arange(position + tokens) > position + torch.arange(tokens)[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        out[row : row + tokens] = torch.einsum("htp,phd->thd", weights, values).to(out.dtype)
