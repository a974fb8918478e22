"""Loads the native code, and a base as a `NativeModel`, if the machine and the base support native code."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from server.model.base.weights import BaseModel
from server.model.native.build import NativeUnavailable
from server.model.native.library import load_library
from server.model.native.model import NativeModel, check_base


def find_library(base: BaseModel, directory: Path, say: Callable[[str], None]) -> ctypes.CDLL | None:
    """Return the library for a base, or None if torch must compute instead. If the base is in bf16 on a CPU, `say`
    also gets the reason why there is no library for it.

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
    """Return the base as a `NativeModel` for serving, or None if `find_library` returns None or memory runs out.

    The model has as many threads as torch, and uses fewer of them if that is faster.
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
            adaptive_threads=True,
        )
    except MemoryError as reason:
        say(f"no native code: {reason}; torch computes instead, more slowly")
        return None
