"""A base of two layers that the kernels support, in fp32."""

from pathlib import Path

import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.kits.tiny import NATIVE_SIZES, save_tiny_base

SIZES = {**NATIVE_SIZES, "num_hidden_layers": 2, "intermediate_size": 128}


def two_layers(directory: Path) -> BaseModel:
    """Make the base in an empty directory."""
    saved = save_tiny_base(directory / "two-layers", options=SIZES)
    return load_base(resolve_base(str(saved), directory), torch.float32)
