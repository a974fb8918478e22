"""What happens to each token's row by itself: the norm, rotary embedding with the cache's write, and the gate."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803, SIM102
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, y, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """y (tokens, D) = x / rms(x) · weight. Grid: (tokens,)."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < D
    h = tl.load(x + row * D + d, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / D + EPS)
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, (h * scale * w).to(y.dtype.element_ty), mask=mask)


def rms_norm_in_torch(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, eps: float) -> None:
    y.copy_(F.rms_norm(x.float(), weight.shape, weight.float(), eps))


@triton.jit
def rotary_write(
    qkv,
    cos,
    sin,
    positions,
    slots,
    q,
    k_cache,
    v_cache,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    IS_ROTARY: tl.constexpr,
):
    """Write rotated queries to q, and rotated keys and values to their slots of the cache.

    qkv (tokens, HEADS + 2 · KV_HEADS, DIM); cos and sin (positions, DIM) of `rotary_table`; k_cache and v_cache
    (slots, KV_HEADS, DIM). Grid: (tokens, HEADS + 2 · KV_HEADS).
    """
    token, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    d = tl.arange(0, half)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    low = tl.load(source + d)
    high = tl.load(source + half + d)
    slot = tl.load(slots + token).to(tl.int64)
    if IS_ROTARY:
        if head < HEADS + KV_HEADS:
            position = tl.load(positions + token).to(tl.int64)
            c = tl.load(cos + position * DIM + d).to(tl.float32)
            s = tl.load(sin + position * DIM + half + d).to(tl.float32)  # the first half has the opposite sign
            a, b = low.to(tl.float32), high.to(tl.float32)
            low = (a * c - b * s).to(qkv.dtype.element_ty)
            high = (b * c + a * s).to(qkv.dtype.element_ty)
    if head < HEADS:
        target = q + (token * HEADS + head) * DIM
    else:
        if head < HEADS + KV_HEADS:
            target = k_cache + (slot * KV_HEADS + head - HEADS) * DIM
        else:
            target = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
    tl.store(target + d, low)
    tl.store(target + half + d, high)


def rotary_write_in_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_rotary: bool,
) -> None:
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    rotated, c, s = qkv.float(), cos[positions][:, None].float(), sin[positions][:, None].float()
    if is_rotary:
        rotated = rotated * c + rotated.roll(qkv.shape[2] // 2, 2) * s
    q.copy_(rotated[:, :heads])
    k_cache[slots] = rotated[:, heads : heads + kv_heads].to(qkv.dtype)
    v_cache[slots] = qkv[:, heads + kv_heads :]


@triton.jit
def swiglu(gate_up, y, D: tl.constexpr, BLOCK: tl.constexpr):
    """y (tokens, D) = silu(gate) · up for gate_up (tokens, 2 · D). Grid: (tokens, D / BLOCK, rounded up)."""
    row = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < D
    gate = tl.load(gate_up + row * 2 * D + d, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * D + D + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=mask)


def swiglu_in_torch(gate_up: torch.Tensor, y: torch.Tensor) -> None:
    gate, up = gate_up.float().chunk(2, -1)
    y.copy_(F.silu(gate) * up)
