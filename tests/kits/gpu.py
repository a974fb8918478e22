"""Helpers of tests on a real GPU, which `make gpu` runs."""

import warnings
from collections.abc import Callable

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def waits(work: Callable[[], object]) -> list[str]:
    """Return torch's warnings about synchronizations of host and GPU during `work`."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}" for warning in said if "synchronizing" in str(warning.message)]
