"""Attention of packed texts by torch's FlashAttention (`torch.nn.attention.varlen`, from torch 2.12 on), on GPUs.

It needs no masks, and no scores of tokens that don't see each other. Not yet run on a GPU: so it is compared with
`PackedAttention` on the card before it is used. Its backward pass must give the same bytes each time, since an
interrupted job continues with them.
"""

import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from server.model.base.config import ModelConfig
from server.model.device import to_device
from server.model.ops.gradients import apply
from server.model.smollm import Attention
from server.system.messages import first_line
from server.training.packed import PackedAttention

log = logging.getLogger(__name__)

_LENGTHS = (1, 300, 7, 130)
"""Texts of the comparison."""
_MAX_ERROR = 0.02
"""The largest error of the comparison, relative to the largest number: some units in bf16's last place."""


class Varlen(Hashable, Protocol):
    """The part of `varlen_attn` that is used here."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor: ...


class PackedTexts(Attention, Protocol):
    """Attention within the texts of a flat batch, with each token's position in its text."""

    positions: torch.Tensor


def attention_for(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Callable[..., PackedTexts]:
    """Return a class whose instances are made of texts' lengths and a device: the fastest that is right here."""
    varlen = varlen_of_torch() if device.type == "cuda" and dtype is torch.bfloat16 else None
    if varlen is None:
        return PackedAttention
    return _checked(varlen, config.num_heads, config.num_kv_heads, config.head_dim, device)


def varlen_of_torch() -> Varlen | None:
    """Return torch's function, or None if this version has none that groups queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None  # type: ignore[return-value]


@cache
def _checked(
    varlen: Varlen, heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> Callable[..., PackedTexts]:
    def make(lengths: Sequence[int], device: torch.device) -> VarlenAttention:
        return VarlenAttention(lengths, device, varlen)

    try:
        expected, *found = (
            _result_and_gradients(attention(_LENGTHS, device), heads, kv_heads, head_dim, device)
            for attention in (PackedAttention, make, make)
        )
        errors = [
            float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            for ours, theirs in zip(found[0], expected, strict=True)
        ]
        is_right = all(error <= _MAX_ERROR for error in errors)
        if is_right and all(map(torch.equal, *found)):
            return make
        log.warning("FlashAttention isn't used: its errors are %s, or differ each time", errors)
    except Exception as error:
        log.warning("FlashAttention isn't used: %s", first_line(error))
    return PackedAttention


def _result_and_gradients(
    attention: PackedTexts, heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        to_device(torch.randn(sum(_LENGTHS), num, head_dim, generator=generator).to(torch.bfloat16), device)
        for num in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention.attend(0, q, k, v)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


class VarlenAttention:
    """An implementation of `smollm.Attention` as `PackedAttention`, whose arguments it takes."""

    def __init__(self, lengths: Sequence[int], device: torch.device, varlen: Varlen) -> None:
        assert all(length > 0 for length in lengths)
        starts = [0, *accumulate(lengths)]
        ends = to_device(torch.tensor(starts, dtype=torch.int32), device)
        longest = max(lengths)
        place = torch.arange(starts[-1], device=device)
        first = to_device(torch.tensor(starts[:-1]).repeat_interleave(torch.tensor(lengths)), device)
        self.positions = place - first

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return varlen(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)

        self._attend = attend

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the output, shaped like q (tokens, heads, head_dim). k and v are (tokens, kv_heads, head_dim)."""
        return apply(_Varlen, q, k, v, self._attend)


class _Varlen(torch.autograd.Function):
    """Recomputes the forward pass in the backward pass, so that only its gradients are deterministic algorithms.

    torch decides this by a global switch, under which other operations would raise errors.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attend: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attend = attend
        return attend(q.contiguous(), k.contiguous(), v.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        inputs = [x.detach().contiguous().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.attend(*inputs)
        with _deterministic():
            return *torch.autograd.grad(out, inputs, d_out.contiguous()), None


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
