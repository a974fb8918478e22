"""A base's matrices in their stored form: GGUF's blocks of 4 or 8 bits per weight.

The native forward pass reads these blocks instead of the bf16 weights. The conversion has checked that the blocks
expand to exactly the same weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

QUANTIZED = "quantized.safetensors"
"""The file in a converted base's directory. Bases without quantized weights have none."""
BLOCK = 32
"""Weights per block. They are neighbours in a row of the matrix."""
BLOCK_BYTES: Mapping[str, int] = {"Q4_1": 20, "Q8_0": 34}
"""Bytes per block of the supported types, by ggml's names."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """One quantized matrix."""

    type: str  # one of BLOCK_BYTES
    blocks: torch.Tensor  # uint8 (out, bytes of a row)

    def expanded(self) -> torch.Tensor:
        """Return the bf16 weights (out, in), expanded by the gguf package. This is slow."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(self.blocks.numpy(), GGMLQuantizationType[self.type])
        return torch.from_numpy(values).to(torch.bfloat16)


def load_quantized(directory: Path) -> dict[str, Quantized]:
    """Map a converted base's quantized tensors, and return them by name. Raise SafetensorError or
    OSError if they can't be read."""
    if not (directory / QUANTIZED).is_file():
        return {}
    with safe_open(directory / QUANTIZED, framework="pt") as file:
        return {name: Quantized(kind, file.get_tensor(name)) for name, kind in file.metadata().items()}
