"""Copies from the host's memory to a GPU's, beside what is computed there."""

from collections.abc import Callable, Sequence
from typing import cast

import torch


class Uploads:
    """A stream of copies of its own on `device`; any thread may use it.

    What computes is on the device's default stream, and isn't told to read the places while they are written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cast("Callable[[torch.device], torch.cuda.Stream]", torch.cuda.Stream)(device)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy each pinned tensor to the place beside it, of its shape and dtype; returns once all are there."""
        with torch.cuda.stream(self._stream):
            there = [(source.to(self._device, non_blocking=True), place) for source, place in pairs]
            # Whoever had these places before may still be read by what was told earlier.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for source, place in there:
                place.copy_(source)
            done = self._stream.record_event(_blocking_event())
        done.synchronize()


def _blocking_event() -> torch.cuda.Event:
    """One that lets whoever waits for it sleep."""
    return cast("Callable[..., torch.cuda.Event]", torch.cuda.Event)(blocking=True)
