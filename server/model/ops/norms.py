"""Normalization, rotary embedding and the gated activation, in plain differentiable torch."""

import torch
import torch.nn.functional as F

from server.model.ops import gradients


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize x over its last axis by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    if x.requires_grad:
        return gradients.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary_table(num_positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """Return the cosines and sines of rotary embedding (Su et al. 2021, arXiv:2104.09864).

    The result is (2, num_positions, head_dim) in fp32: [0] has the cosines, [1] the sines. The first half of the
    sines is negated, so that `rotary` needs no negation.
    """
    frequency = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    )  # (head_dim/2,)
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequency  # (positions, head_dim/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (tokens, heads, head_dim) by rows cos, sin (tokens, 1, head_dim) of `rotary_table`."""
    if x.requires_grad:
        return gradients.rotary(x, cos, sin)
    return gradients.rotate(x, cos, sin)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up of the fused gate_up (tokens, 2 · intermediate); Shazeer 2020, arXiv:2002.05202."""
    if gate_up.requires_grad:
        return gradients.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
