"""Loads the native code and a base's native form, if the machine and the base support it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from server.model.base.weights import BaseModel
from server.model.native.build import NativeUnavailable
from server.model.native.library import load_library
from server.model.native.model import NativeModel, check_base


def find_library(base: BaseModel, directory: Path, say: Callable[[str], None]) -> ctypes.CDLL | None:
    """Return the library for a base in bf16 on a CPU. If there is none, or it doesn't support the base, say why
    and return None: torch computes instead.

    The library is a prebuilt one or the directory's, or it is compiled into the directory.
    """
    if base.device.type != "cpu" or base.dtype is not torch.bfloat16:
        return None  # native code supports nothing else
    try:
        check_base(base.config, base.weights)
        return load_library(directory, say)
    except NativeUnavailable as reason:
        say(f"no native code: {reason}; torch computes instead, more slowly")
        return None


def load_native(
    base: BaseModel, directory: Path, max_positions: int, say: Callable[[str], None]
) -> NativeModel | None:
    """Return a base's native form for serving, or None, like `find_library`.

    It has as many threads as torch, and uses fewer while fewer are faster.
    """
    library = find_library(base, directory, say)
    if library is None:
        return None
    try:
        return NativeModel(
            library,
            base.config,
            base.weights,
            max_positions=max_positions,
            num_threads=torch.get_num_threads(),
            adapts=True,
        )
    except MemoryError as reason:
        say(f"no native code: {reason}; torch computes instead, more slowly")
        return None
