"""Dropout of the inputs of A, from a random stream for each row of the data.

The features that are dropped depend on the row's stream, the layer and the group alone: neither on what the row is
packed with, nor on the steps before. Modules that read the same input share what is dropped (PEFT draws for each).
"""

from collections.abc import Sequence

import torch

from server.model.device import to_device
from server.training.passes.streams import stream

Stream = tuple[int | str, ...]


class Dropout:
    """For one micro-batch: texts of `lengths` tokens, in order, each with its stream's name, as (seed, step, row).

    `factor` makes up for what is dropped (inverted dropout: Srivastava et al. 2014).
    """

    def __init__(self, probability: float, streams: Sequence[Stream], lengths: Sequence[int]) -> None:
        self.factor = 1 / (1 - probability)
        self._keep = 1 - probability
        self._texts = list(zip(streams, lengths, strict=True))

    def kept(self, layer: int, group: str, x: torch.Tensor) -> torch.Tensor:
        """Which features of a group's inputs stay: a mask (tokens, in), where x (·, in) lies.

        The same every time that it is asked for.
        """
        masks = [
            torch.empty(length, x.shape[1]).bernoulli_(
                self._keep, generator=stream("dropout", *name, layer, group)
            )
            for name, length in self._texts
        ]
        return to_device(torch.cat(masks).bool(), x.device)
