"""The settings of a merge as plain values, apart from `adapters.merge`, which imports torch."""

from dataclasses import dataclass
from typing import Literal

MergeMethod = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune", "svd"]
"""The methods, which `adapters.merge` describes."""


@dataclass(frozen=True)
class Recipe:
    """How to merge. `density` is the share of entries to keep, above 0 and at most 1; svd keeps all of them.

    `rank` is the result's rank. If it is given, the products B·A are merged, otherwise A and B separately. With
    svd, None means the largest rank of any part, limited by the module's features.
    """

    method: MergeMethod
    density: float = 1.0
    seed: int = 0
    rank: int | None = None

    @property
    def merges_products(self) -> bool:
        return self.method == "svd" or self.rank is not None
