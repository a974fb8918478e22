"""The native forward for tests: compiled once into the cache, or the reason to skip."""

import ctypes

import pytest
import torch

from server.model.native.library import NativeUnavailable, load_library
from server.model.native.model import NativeModel
from server.model.weights import BaseModel
from tests.conftest import CACHE


def native_library() -> ctypes.CDLL:
    """Skips the test where this machine has none."""
    try:
        return load_library([CACHE / "native"])
    except NativeUnavailable as reason:
        pytest.skip(f"no native forward here: {reason}")


def native_model(base: BaseModel, max_positions: int = 512, num_threads: int = 2) -> NativeModel:
    assert base.dtype is torch.bfloat16
    return NativeModel(
        native_library(), base.config, base.weights, max_positions=max_positions, num_threads=num_threads
    )
