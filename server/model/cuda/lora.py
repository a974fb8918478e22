"""The low-rank products of any adapters and blends of a step, over a list of work items.

A chunk is up to 16 successive tokens that share their adapters. An item is a chunk with up to 16 rows of A of one
module of one adapter. `work.lora_work` makes the lists from the tables that adapters got when they were placed
(`Placement.table`). Ranks, blends and lengths may differ from chunk to chunk.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803, SIM102
from itertools import pairwise

import torch
import triton
import triton.language as tl

TILE = 16
"""Tokens of a chunk, and rows of A in an item: one tile of the tensor cores."""
FIELDS = 6
"""An item's int32: its first token, tokens, first row of A, rows, first unit of B, and the weight's bits."""


@triton.jit
def lora_shrink(x, a_rows, items, num_items, hidden, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """hidden (items, 16, 16) = weight · x[tokens] · a_rows[rows]ᵀ. Grid: any number of programs.

    x (tokens, K), a_rows (rows, K) of one layer. K must be a multiple of BLOCK_K.
    """
    m = tl.arange(0, 16)
    for item in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        first = tl.load(items + item * 6)
        tokens = tl.load(items + item * 6 + 1)
        row = tl.load(items + item * 6 + 2).to(tl.int64)
        rank = tl.load(items + item * 6 + 3)
        weight = tl.load(items + item * 6 + 5).to(tl.float32, bitcast=True)
        acc = tl.zeros((16, 16), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            inputs = tl.load(x + (first + m)[:, None] * K + ks[None, :], mask=m[:, None] < tokens, other=0.0)
            a = tl.load(a_rows + (row + m)[None, :] * K + ks[:, None], mask=m[None, :] < rank, other=0.0)
            acc = tl.dot(inputs, a, acc, input_precision="ieee")
        place = (item * 16 + m)[:, None] * 16 + m[None, :]
        tl.store(hidden + place, (acc * weight).to(hidden.dtype.element_ty))


@triton.jit
def lora_expand(
    hidden,
    b_units,
    items,
    ranges,
    chunks,
    num_chunks,
    y,
    OUT: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    MODULES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[tokens] += Σ of a chunk's items, in their order: hidden · B. Grid: any number of programs.

    One program adds all items to a tile of y, so nothing is atomic. chunks (chunks, 2) has a chunk's first token
    and its tokens; ranges (chunks, MODULES + 1) has where each module's items begin, and the end. The second and
    third module begin at feature OUT1 and OUT2 of OUT. b_units (units, UNIT) is one layer's.
    """
    m = tl.arange(0, 16)
    n = tl.arange(0, BLOCK_N)
    tiles: tl.constexpr = OUT // BLOCK_N
    for work in range(tl.program_id(0), tl.load(num_chunks) * tiles, tl.num_programs(0)):
        chunk = work // tiles
        n0 = (work % tiles) * BLOCK_N
        module = 0
        start = 0
        width = OUT1 if MODULES > 1 else OUT
        if MODULES > 1:
            if n0 >= OUT1:
                module = 1
                start = OUT1
                width = OUT2 - OUT1 if MODULES > 2 else OUT - OUT1
        if MODULES > 2:
            if n0 >= OUT2:
                module = 2
                start = OUT2
                width = OUT - OUT2
        first = tl.load(chunks + chunk * 2)
        tokens = tl.load(chunks + chunk * 2 + 1)
        begin = tl.load(ranges + chunk * (MODULES + 1) + module)
        end = tl.load(ranges + chunk * (MODULES + 1) + module + 1)
        acc = tl.zeros((16, BLOCK_N), dtype=tl.float32)
        for item in range(begin, end):
            rank = tl.load(items + item * 6 + 3)
            unit = tl.load(items + item * 6 + 4).to(tl.int64)
            h = tl.load(hidden + (item * 16 + m)[:, None] * 16 + m[None, :])
            b = tl.load(
                b_units + unit * UNIT + m[:, None] * width + (n0 - start + n)[None, :],
                mask=m[:, None] < rank,
                other=0.0,
            )
            acc = tl.dot(h, b, acc, input_precision="ieee")
        place = (first + m).to(tl.int64)[:, None] * OUT + (n0 + n)[None, :]
        mask = m[:, None] < tl.where(end > begin, tokens, 0)
        old = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + place, (old + acc).to(y.dtype.element_ty), mask=mask)


def lora_shrink_in_torch(
    x: torch.Tensor, a_rows: torch.Tensor, items: torch.Tensor, num_items: torch.Tensor, hidden: torch.Tensor
) -> None:
    hidden[: int(num_items)] = 0
    for item, (first, tokens, row, rank, _, weight) in enumerate(items[: int(num_items)].tolist()):
        scale = torch.tensor(weight, dtype=torch.int32).view(torch.float32)
        product = x[first : first + tokens].float() @ a_rows[row : row + rank].float().t() * scale
        hidden[item, :tokens, :rank] = product.to(hidden.dtype)


def lora_expand_in_torch(
    hidden: torch.Tensor,
    b_units: torch.Tensor,
    items: torch.Tensor,
    ranges: torch.Tensor,
    chunks: torch.Tensor,
    num_chunks: torch.Tensor,
    y: torch.Tensor,
    starts: tuple[int, ...],
) -> None:
    """`starts` has where each module's features begin, and the end."""
    for (first, tokens), ends in zip(chunks[: int(num_chunks)].tolist(), ranges.tolist(), strict=False):
        for module, (start, stop) in enumerate(pairwise(starts)):
            total = torch.zeros(tokens, stop - start)
            for item in range(ends[module], ends[module + 1]):
                rank, unit = int(items[item, 3]), int(items[item, 4])
                b = b_units.flatten()[unit * b_units.shape[1] :][: rank * (stop - start)].view(rank, -1)
                total += hidden[item, :tokens, :rank].float() @ b.float()
            own = y[first : first + tokens, start:stop]
            own.copy_(own.float() + total)
