"""The product with a frozen matrix: y = x Wᵀ, with the residual added in the same kernel."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of a dot: the smallest tile of the tensor cores. Taller programs do several such dots."""


@triton.jit
def linear(
    x,
    w,
    residual,
    y,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_TALL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y (tokens, N) = x (tokens, K) w (N, K)ᵀ [+ residual (tokens, N)].

    Grid: (N / BLOCK_N, tokens / 16), or tokens / 64 if IS_TALL. A tall program reads each tile of w once for four
    dots. N and K must be multiples of their blocks.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    height: tl.constexpr = 64 if IS_TALL else 16
    first = tl.program_id(1) * height
    rows = first + tl.arange(0, 16)
    M = tl.load(num_tokens)
    if first < M:
        acc0 = tl.zeros((16, BLOCK_N), dtype=tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            tile = tl.load(w + cols[None, :] * K + ks[:, None])
            acc0 = _dot_rows(x, tile, acc0, rows, ks, M, K)
            if IS_TALL:
                acc1 = _dot_rows(x, tile, acc1, rows + 16, ks, M, K)
                acc2 = _dot_rows(x, tile, acc2, rows + 32, ks, M, K)
                acc3 = _dot_rows(x, tile, acc3, rows + 48, ks, M, K)
        _store_rows(y, residual, acc0, rows, cols, M, N, HAS_RESIDUAL)
        if IS_TALL:
            _store_rows(y, residual, acc1, rows + 16, cols, M, N, HAS_RESIDUAL)
            _store_rows(y, residual, acc2, rows + 32, cols, M, N, HAS_RESIDUAL)
            _store_rows(y, residual, acc3, rows + 48, cols, M, N, HAS_RESIDUAL)


@triton.jit
def _dot_rows(x, tile, acc, rows, ks, M, K: tl.constexpr):
    a = tl.load(x + rows[:, None] * K + ks[None, :], mask=rows[:, None] < M, other=0.0)
    return tl.dot(a, tile, acc, input_precision="ieee")


@triton.jit
def _store_rows(y, residual, acc, rows, cols, M, N: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    place = rows.to(tl.int64)[:, None] * N + cols[None, :]
    mask = rows[:, None] < M
    if HAS_RESIDUAL:
        acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=mask)


def linear_in_torch(
    x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor | None, y: torch.Tensor, num_tokens: torch.Tensor
) -> None:
    num = int(num_tokens)
    product = x[:num].float() @ w.float().t()
    y[:num] = product if residual is None else product + residual[:num].float()
