"""Dropout of the inputs of LoRA's matrix A. Masks are hashes, with equal bits in native code and in torch.

A token's key is a hash of the seed, the step, the token's training row and its position. Whether a feature is kept
is a hash of the key, the layer, the group of modules that read the same input, and the feature
(`kernels/dropout.h`). So masks don't depend on packing, threads, processors or earlier steps, and no state of a
random generator is stored.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from server.model.device import to_device
from server.model.native.abi import DROPOUT_MULTIPLIERS, DROPOUT_SHARES, DROPOUT_STEP
from server.model.native.training import place_of
from server.model.rank_rows import GroupKey

RowName = tuple[int, int, int]
"""(seed, step, index of the training row): identifies a row's dropout in one step."""


def hash_name(*name: int | str) -> int:
    """Return 64 bits that identify a random stream, such as ("init", seed, layer, module)."""
    data = "|".join(map(str, name)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """How masks for A's inputs in one layer are computed.

    `sizes` has the number of input features of each group of modules that read the same input. `counters` (int32)
    has a number for each hash, group after group. One hash decides which of two features are kept.
    """

    layer: int
    sizes: Mapping[str, int]
    counters: torch.Tensor

    @classmethod
    def of(cls, layer: int, sizes: Mapping[str, int], device: torch.device) -> Self:
        counters = [
            np.arange(_num_hashes(size), dtype=np.uint32) + (place_of((layer, group)) << 16)
            for group, size in sizes.items()
        ]
        found = np.concatenate(counters) * DROPOUT_STEP
        return cls(layer, sizes, to_device(torch.from_numpy(found.view(np.int32)), device))


class Dropout:
    """Dropout in one micro-batch. The micro-batch has the training rows `rows`, whose texts have `lengths` tokens.

    Each input is dropped with `probability`, rounded to a multiple of 1 / DROPOUT_SHARES. Kept inputs are
    multiplied by `factor` (inverted dropout: Srivastava et al. 2014). Modules that read the same input share a
    mask (PEFT draws one for each).
    """

    def __init__(self, probability: float, rows: Sequence[RowName], lengths: Sequence[int]) -> None:
        self.num_dropped = min(round(probability * DROPOUT_SHARES), DROPOUT_SHARES - 1)
        self.factor = DROPOUT_SHARES / (DROPOUT_SHARES - self.num_dropped)
        self.keys = _token_keys(rows, lengths)
        self._halves: tuple[torch.Tensor, ...] = ()  # of the keys, (tokens, 1) on the device
        self._hashes: dict[GroupKey, torch.Tensor] = {}

    def kept(self, inputs: LayerInputs, group: str) -> torch.Tensor:
        """Return the mask (tokens, in features) for the inputs of a group of modules: true if an input is kept.

        The hashes of all of a layer's groups are computed at once, since a GPU computes them in less time than it
        takes to start an operation.
        """
        key = (inputs.layer, group)
        if key not in self._hashes:
            self._hashes = self._hash(inputs)
        hashes = self._hashes.pop(key)
        halves = hashes.view(torch.int16).unflatten(1, (-1, 2)).transpose(1, 2)  # (tokens, 2, hashes)
        kept = torch.empty(halves.shape, dtype=torch.bool, device=hashes.device)
        torch.ge(halves, self.num_dropped - DROPOUT_SHARES // 2, out=kept)
        return kept.flatten(1)[:, : inputs.sizes[group]]

    def _hash(self, inputs: LayerInputs) -> dict[GroupKey, torch.Tensor]:
        """Return the hashes (tokens, ⌈in features / 2⌉) for the inputs of each group of modules in the layer."""
        if not self._halves:
            keys = torch.from_numpy(self.keys.view(np.int32).reshape(-1, 2))  # the lower half first
            self._halves = to_device(keys, inputs.counters.device).split(1, 1)
        lower, upper = self._halves
        x = inputs.counters + lower
        _fold_halves(x)
        x += upper
        for multiplier in DROPOUT_MULTIPLIERS:
            x *= multiplier
            _fold_halves(x)
        parts = x.split([_num_hashes(size) for size in inputs.sizes.values()], 1)
        return {(inputs.layer, group): part for group, part in zip(inputs.sizes, parts, strict=True)}


def _num_hashes(num_inputs: int) -> int:
    return (num_inputs + 1) // 2


def _fold_halves(x: torch.Tensor) -> None:
    """Compute x ^= x >> 16 in place. torch's own shift of int32 would repeat the sign."""
    halves = x.view(torch.int16)  # the lower half first
    halves[:, ::2].bitwise_xor_(halves[:, 1::2])


def _token_keys(rows: Sequence[RowName], lengths: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return a key for each token: the outputs of SplitMix64 (Steele et al. 2014), seeded for each row."""
    states = np.array([hash_name("dropout", *row) for row in rows], dtype=np.uint64)
    counts = np.concatenate([np.arange(1, length + 1, dtype=np.uint64) for length in lengths])
    z = np.repeat(states, lengths) + counts * 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    found: npt.NDArray[np.uint64] = z ^ z >> 31
    return found
