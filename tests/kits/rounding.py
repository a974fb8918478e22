"""Elementwise bounds of the error of results that are rounded to bf16.

A number rounded to bf16, which keeps 8 bits, has a relative error of at most U = 2^-8. Products of two such
numbers are exact in fp32. A sum of n of them in fp32 is off by at most n·2^-24 of the sum of their magnitudes, in
any order. Rounding errors of rounding errors add less than a tenth, covered by `SLACK`.
"""

import math

import torch

U = 2.0**-8
SLACK = 1.1


def is_exact(factor: float) -> bool:
    """Return whether multiplication by `factor` is exact: it is a power of two."""
    return math.frexp(factor)[0] == 0.5


def sum_bound(terms: torch.Tensor) -> torch.Tensor:
    """Return the bound for a sum over the last dimension of exact `terms` (…, n) in fp32, rounded once."""
    magnitudes = terms.abs().sum(-1)
    return SLACK * (U * terms.sum(-1).abs() + terms.shape[-1] * 2.0**-24 * magnitudes)


def sum_of_rounded_bound(terms: torch.Tensor) -> torch.Tensor:
    """Return the bound for such a sum if each term is rounded, too."""
    return sum_bound(terms) + SLACK * U * terms.abs().sum(-1)


def attention_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the bound (dim,) for attention of one query q (dim,) over k, v (positions, dim), each step rounded.

    To first order, an error e_j of score s_j moves the output o by w_j e_j (v_j - o), where w_j is its weight.
    Scores are rounded themselves (U |s_j|), and q times dim^-1/2 is rounded before where that is no power of two:
    the factor (U |s_j|) and each product (U Σ |q_i k_ji| dim^-1/2). Weights are rounded (U w_j |v_j|), and the
    output is (U |o|).
    """
    q, k, v = q.double(), k.double(), v.double()
    scale: float = q.shape[0] ** -0.5
    scores = k @ q * scale
    weights = scores.softmax(0)
    out = weights @ v
    errors = U * scores.abs()
    if not is_exact(scale):
        errors += U * scores.abs() + U * (k.abs() @ q.abs()) * scale
    return SLACK * ((weights * errors) @ (v - out).abs() + U * (weights @ v.abs()) + U * out.abs())
