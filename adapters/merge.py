"""Merge several weighted adapters into one new adapter, in fp32, whose scalings are all 1.

An exact weighted sum needs no merge: the server composes adapters for each request. These methods prune the
adapters, resolve conflicts of sign, or reduce the rank:

    ties             keep each adapter's largest entries, elect a sign for each position by their sum, and average
                     the entries with that sign (Yadav et al. 2023, arXiv:2306.01708)
    dare_linear      drop entries at random, scale the others by 1/density, sum (Yu et al. 2023, arXiv:2311.03099)
    dare_ties        drop entries at random in the same way, then elect signs and average as ties does
    magnitude_prune  keep each adapter's largest entries, sum
    svd              the best approximation of the weighted sum by the given rank (Eckart and Young 1936)

The names are those of PEFT's `add_weighted_adapter`. As in PEFT, each of the first four methods has two variants.
Without a rank, a method works on A and on B separately, each weighted by √|weight · scaling|. That is fast, but
multiplies one adapter's B by other adapters' A. With a rank, it works on the products scaling · B A and factors
the result (PEFT's "…_svd").

Unlike in PEFT, a negative weight negates the adapter before anything else is done, a single adapter is pruned as
well, and adapters may differ in target modules and in rank stabilization. Random choices depend on the seed, the
adapter and the module only.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adapters.errors import InvalidInput
from adapters.lora import LoraConfig, LoraModule, LoraWeights, ModuleKey
from adapters.merge_recipe import Recipe
from adapters.peft.files import describe

Side = Literal["A", "B", "BA"]

WeightedAdapters = Sequence[tuple[LoraWeights, float]]


def check(parts: Iterable[Mapping[ModuleKey, int]], recipe: Recipe) -> None:
    """Raise InvalidInput on `rank` if the adapters' ranks differ, but the recipe merges A and B entry by entry.

    `parts` has the ranks of each adapter's modules.
    """
    if recipe.merges_products:
        return
    ranks: dict[ModuleKey, int] = {}
    for part in parts:
        for key, own in part.items():
            if (rank := ranks.setdefault(key, own)) != own:
                raise InvalidInput.of(
                    "rank",
                    f"the parts have ranks {rank} and {own} in {key.path}, so that their factors can't be "
                    f"compared: set a rank, and {recipe.method} works on the products and factors them again",
                )


def merge(
    adapters: WeightedAdapters, recipe: Recipe, between: Callable[[int, int], None] = lambda done, total: None
) -> LoraWeights:
    """Merge the adapters on the CPU.

    The result targets every module that any of the adapters targets, and doesn't depend on the adapters' order.

    `between(done, total)` is called after each module and may raise. Raise InvalidInput if `check` does, or if
    merged entries are too large for fp32.
    """
    check((weights.ranks for weights, _ in adapters), recipe)
    parts = sorted(adapters, key=lambda part: (part[0].digest, part[1]))
    keys = sorted({key for weights, _ in parts for key in weights.modules})
    rank = recipe.rank or _default_rank(parts)
    modules: dict[ModuleKey, LoraModule] = {}
    for key in keys:
        here = [
            _Part(weights.digest, key, weights.modules[key], weight)
            for weights, weight in parts
            if key in weights.modules
        ]
        a, b = _merged_products(here, recipe, rank) if recipe.merges_products else _merged_factors(here, recipe)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InvalidInput.of("expression", f"has larger values than fp32 can hold in {key.path}")
        modules[key] = LoraModule(a.contiguous(), b.contiguous(), 1.0)
        between(len(modules), len(keys))
    return LoraWeights(modules)


def stacked(adapters: WeightedAdapters) -> LoraWeights:
    """Return the exact weighted sum as one adapter, whose ranks are the sums of the adapters' ranks.

    A contains weights and scalings, as in the server's memory.
    """
    parts: dict[ModuleKey, list[tuple[LoraModule, float]]] = {}
    for weights, weight in adapters:
        for key, module in weights.modules.items():
            parts.setdefault(key, []).append((module, weight * module.scaling))
    return LoraWeights(
        {
            key: LoraModule(
                torch.cat([factor * module.a.float() for module, factor in here]),
                torch.cat([module.b.float() for module, _ in here], dim=1),
                1.0,
            )
            for key, here in parts.items()
        }
    )


def _default_rank(parts: WeightedAdapters) -> int:
    """Return the largest rank of any adapter, limited by the largest rank that a module's B·A can have."""
    modules = [module for weights, _ in parts for module in weights.modules.values()]
    largest = max((module.rank for module in modules), default=0)
    return min(largest, max((min(len(module.b), module.a.shape[1]) for module in modules), default=0))


def config_of(weights: LoraWeights, num_layers: int | None) -> LoraConfig:
    """Return the configuration of merged weights. `num_layers` is the base model's, or None if it is unknown."""
    assert all(module.scaling == 1.0 for module in weights.modules.values())
    rank = weights.max_rank
    return describe(weights, rank, float(rank), use_rslora=False, num_layers=num_layers)


def kept(recipe: Recipe, digest: str, key: ModuleKey, side: Side, shape: torch.Size) -> torch.Tensor:
    """Return DARE's mask of the entries to keep: bool of `shape`, True with probability `recipe.density`."""
    name = f"smolora-dare|{recipe.seed}|{digest}|{key.layer}|{key.module}|{side}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < recipe.density


@dataclass(frozen=True, eq=False)
class _Part:
    """One adapter's LoRA pair at one module, and the adapter's weight in the merge."""

    digest: str
    key: ModuleKey
    module: LoraModule
    weight: float

    @property
    def a(self) -> torch.Tensor:  # (r, in)
        return self.module.a.float()

    @property
    def b(self) -> torch.Tensor:  # (out, r)
        return self.module.b.float()


def _merged_factors(parts: Sequence[_Part], recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the parts' A (r, in) and their B (out, r) separately.

    Both are scaled by √|weight · scaling|, and A also by the sign of the weight.
    """
    weights = [part.weight * part.module.scaling for part in parts]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    a = _combined([part.a for part in parts], signed, parts, recipe, "A")
    b = _combined([part.b for part in parts], roots, parts, recipe, "B")
    return a, b


def _merged_products(parts: Sequence[_Part], recipe: Recipe, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) whose product is nearest to the merged products scaling · B A."""
    if recipe.method == "svd":
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.weight * part.module.scaling * part.b for part in parts], dim=1)
        return _factored(a, b, rank)
    products = [part.module.scaling * (part.b @ part.a) for part in parts]
    merged = _combined(products, [part.weight for part in parts], parts, recipe, "BA")
    return _factored(torch.eye(merged.shape[1]), merged, rank)


def _combined(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    parts: Sequence[_Part],
    recipe: Recipe,
    side: Side,
) -> torch.Tensor:
    """Merge one tensor of each part by the recipe's method. The tensors have equal shapes."""
    pruned = []
    for tensor, weight, part in zip(tensors, weights, parts, strict=True):
        if recipe.method in ("ties", "magnitude_prune"):
            mask = _largest(tensor, recipe.density)
        else:
            mask = kept(recipe, part.digest, part.key, side, tensor.shape) / recipe.density
        pruned.append(mask * math.copysign(1.0, weight) * tensor)
    stacked = torch.stack(pruned)  # (parts, …)
    weighted = stacked * torch.tensor(weights).abs().view(-1, *(1 for _ in tensors[0].shape))
    if recipe.method not in ("ties", "dare_ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)  # the sign with the larger total
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return a mask: 1 at the `density` share of entries with the largest magnitudes, 0 elsewhere."""
    order = tensor.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(tensor.numel())
    mask[order[: int(density * tensor.numel())]] = 1.0
    return mask.view(tensor.shape)


def _factored(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) whose product is nearest to b @ a.

    Both are padded with zeros if `rank` is larger than needed. B contains the singular values. The largest entry
    of each row of A is positive, which makes the factors unique.
    """
    q_in, r_in = torch.linalg.qr(a.T)  # a = r_inᵀ q_inᵀ
    q_out, r_out = torch.linalg.qr(b)
    core = r_out @ r_in.T
    if not core.isfinite().all():  # LAPACK would raise
        return a.new_full((rank, a.shape[1]), math.nan), b.new_full((len(b), rank), math.nan)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    u, vh = (q_out @ u * s)[:, :rank], (vh @ q_in.T)[:rank]
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    missing = rank - len(vh)
    new_a = torch.cat((vh * signs, vh.new_zeros(max(missing, 0), vh.shape[1])))
    new_b = torch.cat((u * signs.T, u.new_zeros(len(u), max(missing, 0))), dim=1)
    return new_a, new_b


_NEGLIGIBLE = 1e-13
"""A sum counts as 0 if its squared norm is at most this share of its terms' squared norms: it is only rounding."""


def distance(adapters: WeightedAdapters, merged: LoraWeights, between: Callable[[], None] = lambda: None) -> float:
    """Return the relative distance of the merged adapter from the exact weighted sum of `adapters`.

    It is ‖Δ - Σ wᵢ Δᵢ‖ / ‖Σ wᵢ Δᵢ‖ over all modules, in Frobenius norms of Δ = scaling · B A, or inf if the sum
    is 0. It is computed in fp64 with a precision of about 1e-7, from ‖B A‖² = Σ BᵀB ∘ A Aᵀ if ranks are small.
    Computing it needs memory for the adapters' weights of one module and for a few dense weights of that module.
    `between` is called before each module and may raise.
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
    """Return ‖Σ weight · scaling · B A‖² of one module."""
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
