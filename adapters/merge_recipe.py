"""How adapters are to be merged, as plain values: who stores or lists jobs needs no torch for it."""

from dataclasses import dataclass
from typing import Literal

MergeMethod = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune", "svd"]
"""What each does, `adapters.merge` says."""


@dataclass(frozen=True)
class Recipe:
    """How to merge. `density` is the share of entries that are kept, above 0 and at most 1; svd keeps all.

    `rank` is the result's: with it, products are merged; without, A's and B's (svd: the largest rank of any part,
    and at most what a product of the base's sizes can have).
    """

    method: MergeMethod
    density: float = 1.0
    seed: int = 0
    rank: int | None = None

    @property
    def merges_products(self) -> bool:
        return self.method == "svd" or self.rank is not None
