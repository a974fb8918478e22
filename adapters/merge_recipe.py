"""The settings of a merge as plain values. They aren't in `adapters.merge` because that module imports torch."""

from dataclasses import dataclass
from typing import Literal

MergeMethod = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune", "svd"]
"""The merge methods. The docstring of `adapters.merge` describes each."""


@dataclass(frozen=True)
class Recipe:
    """How to merge adapters. `density` is the share of entries to keep, above 0 and at most 1; svd keeps all.

    `rank` is the result's rank. If it is given, the products B·A are merged, otherwise A and B separately. With
    svd, a `rank` of None means the largest rank of any adapter, limited by the largest rank that a B·A can have.
    """

    method: MergeMethod
    density: float = 1.0
    seed: int = 0
    rank: int | None = None

    @property
    def merges_products(self) -> bool:
        return self.method == "svd" or self.rank is not None
