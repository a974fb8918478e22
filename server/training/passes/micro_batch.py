"""What one forward and backward pass is over: whole examples, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from server.training.data.examples import Example


def max_tokens(device: torch.device) -> int:
    """At most so many tokens are a micro-batch, unless one example is longer: more cost memory, not time."""
    return 512 if device.type == "cpu" else 4096


@dataclass(frozen=True)
class MicroBatch:
    """All examples' tokens, one after the other, and which of them are predicted.

    `targets[i]` is predicted from the hidden state at `before[i]`, the place before it.
    """

    token_ids: Sequence[int]
    lengths: Sequence[int]  # of the examples
    before: Sequence[int]  # places in token_ids, all different
    targets: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        before: list[int] = []
        targets: list[int] = []
        start = 0
        for example in examples:
            for place in range(1, len(example.token_ids)):
                if example.is_target[place]:
                    before.append(start + place - 1)
                    targets.append(example.token_ids[place])
            start += len(example.token_ids)
        token_ids = [token for example in examples for token in example.token_ids]
        return cls(token_ids, [len(example.token_ids) for example in examples], before, targets)
