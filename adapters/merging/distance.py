"""How far a merged adapter is from the exact weighted sum of its parts, which is what it stands for."""

import math
from collections.abc import Callable, Sequence

import torch

from adapters.lora import LoraModule, LoraWeights
from adapters.merging.merge import WeightedAdapters

_NEGLIGIBLE = 1e-13
"""A sum whose square is below this share of its terms' squares is one that cancels out, but for rounding."""


def distance(adapters: WeightedAdapters, merged: LoraWeights, between: Callable[[], None] = lambda: None) -> float:
    """‖Δ - Σ wᵢ Δᵢ‖ / ‖Σ wᵢ Δᵢ‖ over all modules, in Frobenius norms of Δ = scaling · B A; inf where the sum is 0.

    In fp64, and without the products themselves where ranks are smaller than they: ‖B A‖² is the sum over
    BᵀB ∘ A Aᵀ. Good to about 1e-7. Takes memory for what the adapters hold of one module, and for no more than a
    few of its dense weights beside. `between` is called before each module, and may raise.
    """
    difference = total = scale = 0.0
    for key in {key for weights in (merged, *(weights for weights, _ in adapters)) for key in weights.modules}:
        between()
        terms = [(weights.modules[key], weight) for weights, weight in adapters if key in weights.modules]
        total += _squared_norm(terms)
        scale += sum(_squared_norm([term]) for term in terms)
        difference += _squared_norm([*terms, *([(merged.modules[key], -1.0)] if key in merged.modules else [])])
    if total <= _NEGLIGIBLE * scale:
        return math.inf
    return math.sqrt(max(difference, 0.0) / total)


def _squared_norm(terms: Sequence[tuple[LoraModule, float]]) -> float:
    """‖Σ weight · scaling · B A‖² of one module."""
    if not terms:
        return 0.0
    (num_out, _), (_, num_in) = terms[0][0].b.shape, terms[0][0].a.shape
    if sum(module.rank for module, _ in terms) ** 2 > num_out * num_in:  # BᵀB would be larger than the product
        product = torch.zeros(num_out, num_in, dtype=torch.float64)
        for module, weight in terms:
            product.addmm_(module.b.double(), module.a.double(), alpha=weight * module.scaling)
        return float(product.square().sum())
    a = torch.cat([module.a.double() for module, _ in terms])  # (Σ r, in)
    b = torch.cat([weight * module.scaling * module.b.double() for module, weight in terms], dim=1)  # (out, Σ r)
    return float(((b.T @ b) * (a @ a.T)).sum())
