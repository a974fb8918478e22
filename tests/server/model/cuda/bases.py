"""Small bases that the kernels support, in fp32."""

from pathlib import Path

import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.kits.tiny import NATIVE_SIZES, save_tiny_base

SIZES = {**NATIVE_SIZES, "intermediate_size": 128}


def two_layers(directory: Path) -> BaseModel:
    """Make a base of two layers in an empty directory."""
    return layers(directory, 2)


def layers(directory: Path, number: int) -> BaseModel:
    """Make a base of that many layers in an empty directory."""
    saved = save_tiny_base(directory / "layers", options={**SIZES, "num_hidden_layers": number})
    return load_base(resolve_base(str(saved), directory), torch.float32)
