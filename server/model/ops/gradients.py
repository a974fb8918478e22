"""RMSNorm, rotation and SwiGLU for training, with explicit backward passes.

In autograd's own versions, each operation saves several fp32 copies of its input. Together these copies take a few
times as much memory as all that the matrix products save. The versions here save only the input, and recompute the
rest. Their forward passes give the same bits as those in `server.model.ops.norms`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def apply(function: type[torch.autograd.Function], *inputs: object) -> torch.Tensor:
    """Return `function.apply(*inputs)` with a static type. `function` must return one tensor."""
    return cast("Callable[..., torch.Tensor]", function.apply)(*inputs)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # noqa: ANN401
        """Return dx = (g - n · mean(g · n)) / rms with n = x / rms and g = dy · weight, and the weight's
        gradient."""
        x, weight = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_()
        scale.div_(x.shape[-1]).add_(ctx.eps).rsqrt_()  # 1 / rms
        normed.mul_(scale)
        g = dy.to(torch.float32, copy=True)
        d_weight = (g * normed).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g.mul_(weight)
        mean = torch.linalg.vecdot(g, normed)[..., None] / x.shape[-1]
        dx = g.addcmul_(normed, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), d_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return d_gate_up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: ANN401
        """Rotate back: a rotation's transpose is its inverse."""
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `norms.rms_norm`, differentiable once in x (tokens, hidden) and weight (hidden,)."""
    return apply(_RmsNorm, x, weight, eps)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Compute `norms.rotary`, differentiable once in x."""
    return apply(_Rotary, x, cos, sin)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute `norms.swiglu`, differentiable once."""
    return apply(_SwiGlu, gate_up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x as `norms.rotary` does."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin
