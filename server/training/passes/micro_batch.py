"""What one forward and backward pass is over: whole rows, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from server.training.data.examples import Example


def max_tokens(device: torch.device) -> int:
    """Tokens whose activations exist at one time, unless one row is longer: as fast as more, in less memory."""
    return 512 if device.type == "cpu" else 4096


@dataclass(frozen=True)
class MicroBatch:
    """Token ids of all rows, and where in them a counted token is predicted from, and which token that is."""

    token_ids: Sequence[int]
    lengths: Sequence[int]  # of the rows
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
