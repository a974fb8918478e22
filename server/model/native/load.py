"""The native form of a base, where this machine and the base allow it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from server.model.native.library import NativeUnavailable, load_library
from server.model.native.model import NativeModel
from server.model.weights import BaseModel


def load_native(
    base: BaseModel, directories: Sequence[Path], max_positions: int, say: Callable[[str], None]
) -> NativeModel | None:
    """The native form of a base in bf16 on a CPU; None, after saying why, where the torch path has to serve.

    The library is looked for in `directories`, and made in the last where none has it. It takes as many threads as
    torch does.
    """
    if base.device.type != "cpu" or base.dtype is not torch.bfloat16:
        return None  # nothing that it is for
    try:
        library = load_library(directories, say)
        return NativeModel(
            library, base.config, base.weights, max_positions=max_positions, num_threads=torch.get_num_threads()
        )
    except NativeUnavailable as reason:
        say(f"no native forward: {reason}; torch serves, more slowly")
        return None
