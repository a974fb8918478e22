"""A base's matrices as they were stored: in 4 or 8 bits a weight, in the blocks of a GGUF file.

The native forward reads these in the place of the 16-bit weights, which they expand to bit by bit: that was
checked when they were written beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

QUANTIZED = "quantized.safetensors"
"""The file in a converted base's directory; bases that weren't stored so have none."""
BLOCK = 32
"""Weights of a block, neighbours in a row."""
BLOCK_BYTES: Mapping[str, int] = {"Q4_1": 20, "Q8_0": 34}
"""Of the types that are kept, as ggml names them."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """One matrix."""

    type: str  # one of BLOCK_BYTES
    blocks: torch.Tensor  # uint8 (out, bytes of a row)

    def expanded(self) -> torch.Tensor:
        """The weights (out, in), bf16, as the gguf package has them; slow."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(self.blocks.numpy(), GGMLQuantizationType[self.type])
        return torch.from_numpy(values).to(torch.bfloat16)


def load_quantized(directory: Path) -> dict[str, Quantized]:
    """What there is, by the names of the converted file, mapped. Raises SafetensorError and OSError."""
    if not (directory / QUANTIZED).is_file():
        return {}
    with safe_open(directory / QUANTIZED, framework="pt") as file:
        return {name: Quantized(kind, file.get_tensor(name)) for name, kind in file.metadata().items()}
