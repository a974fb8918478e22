"""Normalization, rotation and activation compared with their formulas in double precision."""

import math

import torch

from server.model.ops.norms import rms_norm, rotary, rotary_table, swiglu


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 8), torch.rand(8) + 0.5
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-3).double(), expected, atol=1e-6)


def test_rms_norm_of_zero_is_zero() -> None:
    assert rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-5).tolist() == [[0.0] * 4]


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    dim, theta, positions = 6, 500.0, [0, 1, 7, 40]
    table = rotary_table(64, dim, theta)
    x = torch.randn(len(positions), 2, dim)
    cos, sin = table[:, torch.tensor(positions)].unsqueeze(2)
    turned = rotary(x, cos, sin)
    for token, position in enumerate(positions):
        for head in range(2):
            for i in range(dim // 2):
                angle = position * theta ** (-2 * i / dim)
                z = complex(x[token, head, i], x[token, head, i + dim // 2]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                assert abs(turned[token, head, i].item() - z.real) < 1e-5
                assert abs(turned[token, head, i + dim // 2].item() - z.imag) < 1e-5


def test_products_of_rotated_vectors_depend_on_distance_alone() -> None:
    table = rotary_table(100, 16, 10_000.0)
    q, k = torch.randn(1, 1, 16).expand(3, 1, 16), torch.randn(1, 1, 16).expand(3, 1, 16)

    def at(x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        return rotary(x, *table[:, torch.tensor(positions)].unsqueeze(2))

    scores = (at(q, [5, 40, 99]) * at(k, [2, 37, 96])).sum(-1)
    assert torch.allclose(scores, scores[0].expand_as(scores), atol=1e-4)


def test_swiglu() -> None:
    x = torch.randn(3, 10)
    gate, up = x.double()[:, :5], x.double()[:, 5:]
    assert torch.allclose(swiglu(x).double(), gate / (1 + (-gate).exp()) * up, atol=1e-6)
