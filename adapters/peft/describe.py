"""The configuration that goes with given weights, from the little that they leave open."""

from adapters.lora import LoraConfig, LoraModule, LoraWeights, scaling
from adapters.peft.files import exceptions_of, in_forward_order, targets_of


def describe(
    weights: LoraWeights, rank: int, alpha: float, use_rslora: bool, num_layers: int | None
) -> LoraConfig:
    """That of this rank and alpha; modules of another rank or scaling are its exceptions.

    `num_layers` is the base's; None: unknown, and each layer is named.
    """
    modules = weights.modules
    names, layers = targets_of(sorted(modules, key=in_forward_order), num_layers)
    ranks = exceptions_of({key: module.rank for key, module in modules.items()}, rank)
    alphas = exceptions_of({key: _alpha(module, alpha, use_rslora) for key, module in modules.items()}, alpha)
    return LoraConfig(rank, alpha, names, use_rslora, ranks, alphas, layers)


def explains(alpha: float, use_rslora: bool, weights: LoraWeights) -> bool:
    """Whether any module has the scaling to which this alpha comes."""
    modules = weights.modules.values()
    return any(scaling(alpha, module.rank, use_rslora) == module.scaling for module in modules)


def _alpha(module: LoraModule, usual: float, use_rslora: bool) -> float:
    """One that comes to exactly the module's scaling: the usual one if it does, else a short one if it does."""
    # of a quotient: whatever the product's rounding, the same division comes to that quotient again
    exact = module.scaling * (float(module.rank) ** 0.5 if use_rslora else float(module.rank))
    likely = (usual, float(f"{exact:.15g}"))
    fits = (alpha for alpha in likely if scaling(alpha, module.rank, use_rslora) == module.scaling)
    return next(fits, exact)
