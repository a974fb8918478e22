"""The native code and the native form of a base, where this machine and the base allow them."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from server.model.base.weights import BaseModel
from server.model.native.base import check_base
from server.model.native.library import NativeUnavailable, load_library
from server.model.native.model import NativeModel


def find_library(base: BaseModel, directories: Sequence[Path], say: Callable[[str], None]) -> ctypes.CDLL | None:
    """The library, for a base in bf16 on a CPU; None, after saying why, where torch has to do
    instead: the base may not be covered either.

    It is looked for in `directories`, and made in the last where none has it.
    """
    if base.device.type != "cpu" or base.dtype is not torch.bfloat16:
        return None  # nothing that it is for
    try:
        check_base(base.config, base.weights)
        return load_library(directories, say)
    except NativeUnavailable as reason:
        say(f"nothing native: {reason}; torch does it, more slowly")
        return None


def load_native(
    base: BaseModel, directories: Sequence[Path], max_positions: int, say: Callable[[str], None]
) -> NativeModel | None:
    """Return the native form of a base for serving, or None, as `find_library`.

    It has as many threads as torch, and uses fewer of them while fewer are faster.
    """
    library = find_library(base, directories, say)
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
        say(f"nothing native: {reason}; torch does it, more slowly")
        return None
