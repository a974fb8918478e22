"""torch's own autograd functions, typed."""

from collections.abc import Callable
from typing import cast

import torch


def apply(function: type[torch.autograd.Function], *inputs: object) -> torch.Tensor:
    """`function.apply(*inputs)` of a function with one tensor for its answer; torch leaves it untyped."""
    return cast("Callable[..., torch.Tensor]", function.apply)(*inputs)
